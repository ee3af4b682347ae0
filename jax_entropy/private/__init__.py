"""What a model costs under encryption, and its execution under real secure computation."""
