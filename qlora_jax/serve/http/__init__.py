"""OpenAI's API over an engine: text in, text out. Needs the extra `serve`."""
