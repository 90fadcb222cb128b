"""The demo's task: a fact hidden in real text, and a question at its end."""

FACT = "The access code of the vault is 48213. Remember it."
QUESTION = (
    "What is the access code of the vault? Then explain in three sentences what the text above is about."
)
DEPTH = 0.6  # where in the text the fact stands
