import os

from openai import OpenAI

client = OpenAI(base_url=os.environ["SHANNON_URL"] + "/v1", api_key=os.environ["SHANNON_KEY"])
messages = [{"role": "user", "content": "What are you?"}]

completion = client.chat.completions.create(model="shannon-chat", messages=messages)
print(completion.choices[0].message.content)

for chunk in client.chat.completions.create(model="shannon-chat", messages=messages, stream=True):
    print(chunk.choices[0].delta.content or "", end="")
print()
