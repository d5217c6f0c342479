"""One reader for each form in which the field keeps training data; `table.FORMATS` is the table."""
