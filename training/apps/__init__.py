"""What people run beside training and evaluation: the demo, predictions, a web page, servers, lmms-eval."""
