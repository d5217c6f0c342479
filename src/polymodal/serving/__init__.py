"""A model behind OpenAI's HTTP API: `protocol` the JSON, `scheduler` whose turn it is, `app` the routes, `server`."""
