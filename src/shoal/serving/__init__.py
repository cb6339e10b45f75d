"""HTTP: a model served as OpenAI's API serves one.

The life of a request: `protocol` bounds the connection, `door` asks for the key and counts, `app` routes; an endpoint
(`chat`, `completions`, `responses`, `embeddings`) reads its body (`schema`) and makes token ids of it (`dialect` knows
how a model family writes tools); `generation` draws its choices from the engine, within the `gate`, and gives up when
the client has gone; the endpoint says the result in OpenAI's shape, whole or as server-sent events (`events`).
`opening` makes what a server's settings ask for.
"""
