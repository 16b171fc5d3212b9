"""Many GPUs: the Ray Serve application, its OpenAI-compatible HTTP and its control plane."""
