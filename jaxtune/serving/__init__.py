"""The parts of the HTTP server: request bodies (requests), answers as JSON (replies), batches (worker), HTTP (server)."""
