"""A model behind HTTP, piece by piece: the body of a request (requests), its answers as JSON (replies), batches (worker), HTTP (server)."""
