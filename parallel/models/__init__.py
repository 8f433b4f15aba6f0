"""Plain models whose training steps show what the planner finds: MLP, GPT, Llama, Mixtral, ViT, CNN.

`example(name, ...)` builds one with a loss, an optimizer and a batch, ready for `parallel.capture`.
"""
