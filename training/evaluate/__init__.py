"""One harness: methods under conditions, on tasks, by metrics, in a report."""
