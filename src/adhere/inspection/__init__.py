"""One prompt and one response, the attention between them laid over the text: for notebook, page and terminal."""
