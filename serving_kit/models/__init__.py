"""Models as the worker runs them; the only place that knows torch."""
