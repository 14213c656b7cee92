"""Export of tasks to ONNX and torch.export."""
