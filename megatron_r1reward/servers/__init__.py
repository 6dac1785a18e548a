"""The life of vLLM servers: how one is called, started, watched, mended, put to sleep and ended."""
