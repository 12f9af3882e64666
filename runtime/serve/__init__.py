"""``tg-serve``: the model kept loaded behind OpenAI's chat API, a page and Wyoming.

Needs the extra ``[serve]`` (Starlette, uvicorn, prometheus_client) and for Wyoming ``[wyoming]``;
nothing outside this package imports it. The way of a request: :mod:`app` reads and checks it,
:mod:`chat` takes it apart, :mod:`engine` runs it in its turn, :mod:`replies` writes the answer.
"""
