"""A packed checkpoint behind the HTTP interface of OpenAI.

`protocol` says what may be asked, `prompt` makes tokens of it, `engine` computes one token of each request in turn,
`reader` makes text of them, `app` answers; `guard` lets in who has a key.
"""
