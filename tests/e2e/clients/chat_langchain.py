import os

from langchain_openai import ChatOpenAI

llm = ChatOpenAI(
    model="shannon-chat",
    base_url=os.environ["SHANNON_URL"] + "/v1",
    api_key=os.environ["SHANNON_KEY"],
)

print(llm.invoke("What are you?").content)

for chunk in llm.stream("What are you?"):
    print(chunk.content, end="")
print()
