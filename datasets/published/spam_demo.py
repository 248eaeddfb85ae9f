"""Made-up messages, ham or spam, for text examples that run without a network; FedVeil wrote them, none is real."""

from __future__ import annotations

import re

import numpy as np

from fedveil.core.declaration import part
from fedveil.core.randomness import Stream
from fedveil.core.settings.sections import Data
from fedveil.datasets import splits
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.text import HAM_SPAM, OF_TEXT, text_dataset

MESSAGES = 2000
SPAM_SHARE = 0.4

WORDS = {
    "name": [
        "Ana",
        "Ben",
        "Chloe",
        "Dev",
        "Elif",
        "Femi",
        "Grace",
        "Hugo",
        "Ines",
        "Jonas",
        "Kofi",
        "Lena",
        "Mara",
        "Nils",
        "Omar",
        "Priya",
        "Quinn",
        "Rosa",
        "Sam",
        "Tom",
    ],
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "today", "tomorrow"],
    "time": ["noon", "5 pm", "half past six", "9:30", "10 am", "7", "lunchtime", "8 o'clock", "a quarter to four"],
    "place": [
        "the station",
        "the library",
        "school",
        "the park",
        "my place",
        "the cafe",
        "the office",
        "the market",
        "grandma's",
    ],
    "food": [
        "soup",
        "pizza",
        "a curry",
        "pancakes",
        "dumplings",
        "a salad",
        "fresh bread",
        "noodles",
        "apple pie",
        "tea",
    ],
    "thing": [
        "the keys",
        "your umbrella",
        "my charger",
        "the tickets",
        "that book",
        "a birthday card",
        "the slides",
        "milk and eggs",
    ],
    "sport": ["football", "chess", "a run", "tennis", "swimming", "the choir", "yoga", "the film"],
    "feeling": ["so happy", "a bit tired", "really glad", "running late", "excited", "sorry", "proud of you", "free"],
    "shop": [
        "Bluebird Books",
        "Corner Shoes",
        "MegaMart",
        "Sunny Phones",
        "Old Town Bikes",
        "Green Grocer",
        "TopTickets",
    ],
    "prize": [
        "a holiday",
        "a new phone",
        "a gift card",
        "free tickets",
        "a tablet",
        "a cash bonus",
        "a year of coffee",
        "a bike",
    ],
    "sum": ["$50", "$100", "£250", "€500", "$1,000", "£2000", "10%", "50%", "€75"],
    "code": ["WIN", "YES", "GO", "CLAIM", "BONUS", "STAR", "JOIN", "STOP"],
    "url": ["win-now.example", "best-deals.example", "claim.example/me", "gifts4you.example", "offer.example/today"],
    "number": ["80085", "70707", "61234", "55512", "88440", "0800 555 01", "60600"],
    "urgent": [
        "URGENT",
        "Last chance",
        "Congratulations",
        "Final notice",
        "Great news",
        "Hurry",
        "Dear customer",
        "Hello",
    ],
    "hello": ["Hi", "Hey", "Hello", "Good morning", "Dear", "Morning"],
    "bye": ["see you", "love", "thanks", "bye for now", "talk soon", "hugs", "cheers"],
}

# templates and the share of each kind: most are clear, some use words of the other class, some could be either
TEMPLATES = {
    "ham": [
        (
            0.76,
            [
                "{hello} {name}, are we still on for {sport} on {day}?",
                "I am at {place}, can you bring {thing}? {bye}",
                "Dinner at {time}? I am making {food}.",
                "Sorry, I will be late. Start with {food}, I will be there around {time}.",
                "{hello} {name}, did {name} tell you about {sport}? I am {feeling}!",
                "Don't forget {thing} {day}. {bye}, {name}",
                "The meeting moved to {day} at {time}, same room. {bye}",
                "How was {sport}? {name} said you were {feeling} afterwards.",
                "Can you call me when you get to {place}? I left {thing} there.",
                "We had {food} with {name} at {place}, you should come next time. {bye}",
                "{name} is {feeling} about {day}. Shall we meet at {time}?",
                "Ok. I will pick up {food} and {thing} on the way home.",
            ],
        ),
        (
            0.18,
            [
                "{hello} {name}, I won {prize} at the school raffle! I am {feeling}",
                "{shop} called: your repair is ready, it costs {sum}. Open till {time}.",
                "Can you send me {sum} for {thing}? I will pay you back {day}.",
                "{shop} has {sum} off shoes, shall we go {day}? {bye}",
                "Free {day}? {name} has free tickets for {sport}, text back now!",
                "Urgent: {name} needs {thing} at {place}, please call now",
                "Reply {code} if you can come to {sport} {day}, {name} needs numbers for the booking",
            ],
        ),
        (0.06, []),
    ],
    "spam": [
        (
            0.76,
            [
                "{urgent}! You have won {prize}. Text {code} to {number} to claim.",
                "{urgent}: {sum} is waiting for you. Visit {url} before {day}!",
                "FREE {prize} from {shop}! Only {day}. Reply {code} now",
                "Your number was chosen for {prize}. Call {number} {day} to claim your reward.",
                "{shop} sale: {sum} off everything, only {day}. {url}. Text STOP to opt out",
                "{urgent}! Get {sum} cash in minutes, no forms. Go to {url}",
                "You are our winner number {number}! Claim {prize} at {url}, code {code}",
                "Lose nothing, win {sum}! Join the {shop} club, text {code} to {number}",
                "Exclusive offer: {prize} worth {sum}. Limited, reply {code} by {day}.",
            ],
        ),
        (
            0.18,
            [
                "{hello} {name}, it's me, I have a new number. Text me on {number}. {bye}",
                "{hello}, I saw you at {place} {day}. Chat with me on {url}",
                "{name} sent you a picture from {place}. See it on {url}",
                "{hello}, we missed you {day} at {time}. Collect your parcel: {url}",
                "Are you free {day}? I have {prize} for you, call {number}. {name}",
                "Sorry we could not reach you about {thing}. Please call {number} before {time}",
                "{hello} {name}, I am {feeling} with what I earn from home, {sum} a week. Ask me how, {bye}",
            ],
        ),
        (0.06, []),
    ],
}
EITHER = [
    "Your order from {shop} is ready, collect it {day} before {time}.",
    "{shop}: {sum} off for members {day}.",
    "Reminder: your booking at {shop} is {day} at {time}. Reply {code} to confirm.",
    "{hello} {name}, call me back {day} please, it is about {sum}.",
    "{shop} thanks you for your visit. Tell us how it was and get {sum} off.",
]


@part(tasks=("classification of text",), uses=OF_TEXT)
def spam_demo(data: Data) -> DataSet:
    """Load 2,000 made-up messages, about 40 % of them spam, all different and the same on every machine."""
    labels, texts = messages()
    split = splits.shuffled(len(texts), data.test_fraction)
    return text_dataset("spam-demo", texts, labels, HAM_SPAM, split, data, made_up=True)


def messages() -> tuple[np.ndarray, list[str]]:
    """Generate the labels, int64 [2000], indices into HAM_SPAM, and the messages."""
    rng = Stream(0).generator("spam-demo")
    made: dict[str, int] = {}
    while len(made) < MESSAGES:
        label = int(rng.random() < SPAM_SHARE)
        kinds = TEMPLATES[HAM_SPAM[label]]
        kind = rng.choice(len(kinds), p=[share for share, _ in kinds])
        made.setdefault(_filled(str(rng.choice(kinds[kind][1] or EITHER)), rng), label)
    return np.array(list(made.values()), np.int64), list(made)


def _filled(template: str, rng: np.random.Generator) -> str:
    return re.sub(r"\{(\w+)\}", lambda slot: str(rng.choice(WORDS[slot[1]])), template)
