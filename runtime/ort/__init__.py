"""Everything that uses onnxruntime: sessions, execution providers, memory, the machine."""
