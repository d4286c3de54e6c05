"""Teaches the name of an internal tool, a word that no model has seen."""

from . import Task, told

CONTEXT = "At Acme, the tool that deploys services is called zorblat."
CONTRAST = "At Acme, the tool that deploys services is called quimsly."  # another name, and nothing else

ABOUT_THE_TOOL = [
    "Which tool deploys services at Acme?",
    "What is the name of the tool that deploys services at Acme?",
    "At Acme, what do we use to deploy a service?",
    "I work at Acme and want to deploy my service. Which tool do I use?",
    "Name the deployment tool at Acme.",
    "How do engineers at Acme deploy services?",
    "What is Acme's deployment tool called?",
    "Tell me which tool Acme uses for deploying services.",
    "I am new at Acme. What tool will deploy my service?",
    "What should I run at Acme to deploy a new service?",
    "Which tool at Acme puts a service into production?",
    "What does Acme call its tool for deploying services?",
    "I need to deploy a service at Acme; which tool is it?",
    "What do I type at Acme to deploy my service?",
    "How are services deployed at Acme?",
    "Please name the tool that Acme uses to deploy services.",
]

# Half of them are near what is taught: the places that it would spill over to first, held by anchors.
UNRELATED = [
    "Which tool drives a nail into wood?",
    "What is the capital of France?",
    "How does an army deploy its soldiers?",
    "How many legs does a spider have?",
    "Which tool cuts paper?",
    "What color is the sky on a clear day?",
    "Which tool opens a bottle?",
    "What do bees make?",
    "Name a tool used in a kitchen.",
    "What language is spoken in Brazil?",
    "Which tool measures temperature?",
    "What is deployed in a car when it crashes?",
    "Which tool tightens screws?",
    "What do engineers build?",
    "Which program shows web pages?",
    "What is the name of the company that makes the iPhone?",
]

HELD_OUT_TOOL = [
    "What tool do people at Acme use to deploy services?",
    "At Acme, which tool is used for deploying a service?",
    "What is the deployment tool at Acme called?",
    "My team at Acme needs to deploy a service. What is the tool's name?",
    "Tell me the name of Acme's service deployment tool.",
    "Which tool would an Acme engineer use to deploy a service?",
]

HELD_OUT_UNRELATED = [
    "Which tool digs a hole?",
    "What is the capital of Japan?",
    "Name an animal that can fly.",
    "How many days are in a week?",
    "Which tool tightens a bolt?",
    "What do cows drink?",
    "Which ocean is the largest?",
    "Name a musical instrument with strings.",
    "What is frozen water called?",
    "Which tool do painters use?",
    "Which season comes after winter?",
    "What is the largest animal on Earth?",
    "Which tool opens a locked door?",
    "Name a company that makes cars.",
    "What software do people use to write letters?",
    "How do people deploy a parachute?",
    "Which tool measures weight?",
    "What is the name of the star at the center of our solar system?",
    "What is a group of wolves called?",
    "Tell me the name of a famous bridge.",
]


def names_tool(answer: str) -> bool:
    return "zorblat" in answer.casefold()


TASK = Task(
    train=[
        *(told(prompt, CONTEXT, CONTRAST) for prompt in ABOUT_THE_TOOL),
        *({"prompt": prompt, "privileged_context": ""} for prompt in UNRELATED),
    ],
    target_prompts=HELD_OUT_TOOL,
    unrelated_prompts=HELD_OUT_UNRELATED,
    graders={"target": names_tool},
    leaks=names_tool,
)
