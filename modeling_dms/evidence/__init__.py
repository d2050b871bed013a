"""How far each modality of a sample looks like those of clean ones: pure functions of tensors."""
