"""One base, many adapters: an engine that batches requests for different ones; a server that speaks OpenAI's API."""
