# Two steps: each token with its entropy, the ten best tokens, and the attention of every head of layer 0.
curl -sN "$SHANNON_URL/v1/inspect" \
  -H "Authorization: Bearer $SHANNON_KEY" -H "Content-Type: application/json" \
  -d '{"messages": [{"role": "user", "content": "What are you?"}], "trace_layer": 0, "max_new_tokens": 2, "temperature": 0}'
