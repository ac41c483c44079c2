# Read two events of a stream, close the connection, and resume after the second.
curl -sN -D head.txt "$SHANNON_URL/v1/chat/completions" \
  -H "Authorization: Bearer $SHANNON_KEY" -H "Content-Type: application/json" \
  -d '{"messages": [{"role": "user", "content": "What are you?"}], "stream": true, "resumable": true}' | head -n 6

where=$(sed -n 's/^x-shannon-resume: *\([^[:space:]]*\).*/\1/Ip' head.txt)
curl -sN "$SHANNON_URL$where?starting_after=2" -H "Authorization: Bearer $SHANNON_KEY"
