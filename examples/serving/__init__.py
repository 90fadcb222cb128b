"""An OpenAI-compatible server on one compiled model (docs/serving.md): an example of what `kvpass.Cache` can do.

app        routes, bodies and answers; streaming; a client that leaves
schema     what a request may say; errors: how it is refused
engine     one thread: who waits, who joins the batch, who leaves it
batch      rows of one cache: `merge` to join, `select` to leave; prefixes: `fork`
admission  bytes: who fits, before anything is computed
lifecycle  draining on SIGTERM; warm: everything is compiled before the port opens
cli        the operator's choices; soak: clients, floods and disconnects against a server
"""
