"""Untrusted bytes to arrays, with limits: where media come from (`source`) and pictures (`image`)."""
