"""A model, or what a run has trained, behind OpenAI's protocol: `espl-train serve RUN | MODEL`."""
