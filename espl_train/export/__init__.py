"""What a run is worth outside of it: its prompt with its provenance, its adapter, a request to send."""
