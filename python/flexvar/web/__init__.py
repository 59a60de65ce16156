"""The web page ``flexvar web``: generation and editing in a browser, on Gradio, without the internet."""
