"""Short text-only conversations, so that training on picture questions does not spoil the language model's manners."""

from __future__ import annotations

import random

_CHAT: list[list[tuple[str, str]]] = [
    [("Hello!", "Hello! How can I help you today?"), ("How are you?", "I am fine, thank you. How are you?")],
    [("Hi there.", "Hi! What would you like to talk about?"), ("Tell me who you are.", "I am a small assistant that can look at pictures and answer questions.")],
    [("Good morning!", "Good morning! What can I do for you?"), ("Can you look at pictures?", "Yes. Send me a picture and ask me about it.")],
    [("Good evening.", "Good evening! How can I help?"), ("Thank you, that is all.", "You are welcome. Have a nice evening!")],
    [("Are you a human?", "No, I am a language model."), ("Do you make mistakes?", "Yes, I am a small model, so please check important answers.")],
    [("What can you do?", "I can describe pictures, count things, name colors and answer short questions.")],
    [("Thank you very much!", "You are welcome!"), ("Goodbye.", "Goodbye! See you soon.")],
    [("Can you help me?", "Of course. What do you need?"), ("I want to learn about animals.", "Good idea. Send me a picture of an animal or ask me a question.")],
    [("Do you like music?", "I cannot hear music, but I like to talk about it.")],
    [("Tell me a short joke.", "Why did the banana go to the doctor? It was not peeling well.")],
    [("I am sad today.", "I am sorry to hear that. Do you want to talk about it?"), ("Yes, thank you.", "I am here. Tell me what happened.")],
    [("What is in my picture?", "You have not sent a picture yet. Please send one and I will have a look.")],
    [("How many cats are in the picture?", "I do not see a picture. Please send it first.")],
    [("你好！", "你好！我能帮你做什么？"), ("谢谢你。", "不客气！")],
    [("你是谁？", "我是一个可以看图片并回答问题的小助手。")],
]  # fmt: skip
_CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "China": "Beijing",
    "Egypt": "Cairo", "Canada": "Ottawa", "Norway": "Oslo", "Greece": "Athens", "Portugal": "Lisbon", "Poland": "Warsaw",
    "Austria": "Vienna", "Russia": "Moscow", "Kenya": "Nairobi", "Peru": "Lima", "Cuba": "Havana", "Ireland": "Dublin",
}  # fmt: skip
_FACTS = [
    ("What do bees make?", "Bees make honey."), ("How many legs does a spider have?", "A spider has eight legs."),
    ("How many days are in a week?", "There are seven days in a week."), ("What do cows give us?", "Cows give us milk."),
    ("What color is the sky on a clear day?", "The sky is blue."), ("What color is grass?", "Grass is green."),
    ("Which animal says moo?", "A cow says moo."), ("Which animal barks?", "A dog barks."),
    ("What do we use to cut paper?", "We use scissors."), ("What do we use to open a lock?", "We use a key."),
    ("Where do fish live?", "Fish live in water."), ("What do pandas eat?", "Pandas eat bamboo."),
    ("What is frozen water called?", "Frozen water is called ice."), ("How many wheels does a bicycle have?", "A bicycle has two wheels."),
    ("Which planet do we live on?", "We live on Earth."), ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is the opposite of big?", "The opposite of big is small."), ("How many months are in a year?", "There are twelve months in a year."),
    ("Is a tomato a fruit or a vegetable?", "A tomato is a fruit, but cooks treat it as a vegetable."),
    ("What do you wear on your feet?", "You wear shoes and socks on your feet."), ("What does a clock show?", "A clock shows the time."),
    ("What shape has three sides?", "A triangle has three sides."), ("What shape has four equal sides?", "A square has four equal sides."),
    ("What is a baby cat called?", "A baby cat is called a kitten."), ("What is a baby dog called?", "A baby dog is called a puppy."),
    ("Can penguins fly?", "No, penguins cannot fly, but they swim very well."), ("What do you need when it rains?", "You need an umbrella."),
    ("Which season comes after winter?", "Spring comes after winter."), ("Where does the sun rise?", "The sun rises in the east."),
    ("What is the largest animal?", "The blue whale is the largest animal."), ("What do plants need to grow?", "Plants need water, light and air."),
]  # fmt: skip


def conversation(rng: random.Random) -> list[tuple[str, str]]:
    """Draw a text-only conversation of one to four turns.

    Args:
        rng: Draws it.

    Returns:
        (user, assistant) turns.
    """
    style = rng.random()
    if style < 0.4:
        return list(rng.choice(_CHAT))
    turns: list[tuple[str, str]] = [("Hello!", "Hello! What would you like to know?")] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        draw = rng.random()
        if draw < 0.25:
            country = rng.choice(list(_CAPITALS))
            turns.append((f"What is the capital of {country}?", f"The capital of {country} is {_CAPITALS[country]}."))
        elif draw < 0.45:
            a, b = rng.randint(1, 10), rng.randint(1, 10)
            turns.append((f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."))
        else:
            turns.append(rng.choice(_FACTS))
    if rng.random() < 0.3:
        turns.append(("Thanks!", "You are welcome!"))
    return turns
