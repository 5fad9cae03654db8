"""What a node and a gate can be asked, as an OpenAPI 3.1 document, and as a page to read it.

Both serve the same API to clients, so both take it from here. `fields` describes request bodies, `document` puts paths
together, `page` shows a document. Tests hold it to the code: every route is in it and no other, and each field that it
names is one that the endpoint honours.
"""
