"""How text is generated: plans of orders and steps, passes through the cache, draws of tokens, verified parallel steps."""
