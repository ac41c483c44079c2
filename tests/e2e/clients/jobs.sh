# Open the stream of a client called "laptop", submit two jobs to it, and close it when they are done.
curl -sN "$SHANNON_URL/api/v1/chat/stream/laptop" -H "Authorization: Bearer $SHANNON_KEY" &
sleep 1
for prompt in "What are you?" "Who are you?"; do
  curl -s "$SHANNON_URL/api/v1/chat/submit" \
    -H "Authorization: Bearer $SHANNON_KEY" -H "Content-Type: application/json" \
    -d "{\"client_id\": \"laptop\", \"prompt\": \"$prompt\"}"
done
sleep 5
curl -s -X DELETE "$SHANNON_URL/api/v1/chat/stream/laptop" -H "Authorization: Bearer $SHANNON_KEY"
wait
