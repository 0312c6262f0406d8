"""The HTTP server: OpenAI's and Anthropic's protocols in front of an `AsyncLLM`. Nothing here imports torch."""
