"""CIDEr-D, BLEU and ROUGE-L as a module of `evaluate`."""
