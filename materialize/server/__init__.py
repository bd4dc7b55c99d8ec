"""HTTP requests in, features out: what ``materialize serve`` runs. The only room that knows FastAPI, Starlette and uvicorn."""
