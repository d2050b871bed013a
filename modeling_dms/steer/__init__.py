"""From modality weights to the attention of the language model."""
