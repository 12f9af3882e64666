"""TinyGiantALM on the edge: :mod:`tinygiant.runtime` answers, :mod:`tinygiant.export` makes bundles."""
