"""Models as the worker runs them; the only place that imports torch."""
