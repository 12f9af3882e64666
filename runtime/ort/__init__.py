"""Everything that touches onnxruntime: sessions, execution providers, memory, the machine."""
