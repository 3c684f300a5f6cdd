"""`memfaas bench verbs`: the verbs fabric beside what the same device does with nothing around it."""
