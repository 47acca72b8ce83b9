"""From the text of a model to reasoning, content and tool calls: one module per format."""
