"""What each operator does to channels: one module a family; ``graph.ops`` says which rule is whose."""
