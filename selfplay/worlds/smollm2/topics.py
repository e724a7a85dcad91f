"""What the instruction prompts are about, and what they ask for. Each kind of topic has tasks of its own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """Topics of one kind, and tasks that fit all of them: `{x}` stands for the topic."""

    topics: tuple[str, ...]
    tasks: tuple[str, ...]


def _listed(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(";"))


KINDS: dict[str, Kind] = {
    "thing": Kind(
        topics=_listed(
            "a bicycle; a lighthouse; a violin; a kitchen knife; a wool blanket; a paper map; a tent; a chess board; a telescope; "
            "a candle; a rocking chair; a wristwatch; a school bus; a fishing rod; a teapot; a mirror; a snowman; a compass; "
            "a garden hose; a typewriter; a piggy bank; a rowing boat; a hammock; a water mill; a street lamp; a kite; "
            "a library card; a fountain pen; a camping stove; a drum; a scarecrow; an elevator; an umbrella; an old radio; "
            "a wooden ladder; a sewing machine; a bakery oven; a postage stamp; a ferry; a greenhouse; a solar panel; a dictionary; "
            "a pair of boots; a bird feeder; a toothbrush; a glass marble; a steam train; a hot air balloon"
        ),
        tasks=(
            "Describe {x}.",
            "Write a short poem about {x}.",
            "Explain what {x} is good for.",
            "Write an advertisement for {x}.",
            "Tell a very short story in which {x} is important.",
            "Explain to a child what {x} is.",
            "Write a product review of {x}.",
            "Imagine {x} could talk. What would it say?",
            "Give reasons why somebody would want to own {x}.",
            "Write a riddle whose answer is {x}.",
            "Say how one takes good care of {x}.",
        ),
    ),
    "nature": Kind(
        topics=_listed(
            "the moon; rain; honey bees; mountains; the desert; owls; volcanoes; oak trees; rivers; penguins; thunderstorms; "
            "sunflowers; whales; autumn leaves; coral reefs; spiders; rainbows; wolves; mushrooms; glaciers; butterflies; "
            "the north wind; sea turtles; fog; horses; hedgehogs; waterfalls; salmon; cactuses; the morning star"
        ),
        tasks=(
            "Tell me something interesting about {x}.",
            "Write a short poem about {x}.",
            "Write a few lines for a school book about {x}.",
            "Explain why people like to look at {x}.",
            "Describe {x} to somebody who has never seen anything like it.",
            "Write a diary entry of a traveller who is thinking about {x}.",
            "Make up a legend about {x}.",
            "Write a caption for a photograph of {x}.",
            "Say what one can learn from {x}.",
        ),
    ),
    "activity": Kind(
        topics=_listed(
            "learning to swim; baking bread; growing tomatoes; saving money; moving to another city; sleeping better; "
            "playing the guitar; writing letters by hand; cooking soup; studying for an exam; riding a horse; painting a room; "
            "walking a dog; speaking in public; packing a suitcase; repairing a flat tyre; making new friends; reading every day; "
            "keeping a diary; planning a birthday party; running a marathon; learning a new language; knitting a scarf; "
            "drinking enough water; waking up early; cleaning a kitchen; taking photographs; singing in a choir; "
            "collecting coins; building a bookshelf; meditating; travelling by train; working from home; juggling; "
            "brewing coffee; raising chickens; hiking in winter; setting up an aquarium"
        ),
        tasks=(
            "Give some advice about {x}.",
            "Explain how a beginner starts with {x}.",
            "Write a message to a friend who is thinking about {x}.",
            "Name some mistakes that people make when {x}.",
            "Say what is hard about {x}.",
            "Write a short speech in praise of {x}.",
            "Write a note to yourself about {x}.",
            "Explain why {x} is worth the time.",
            "Write the first lines of a blog post about {x}.",
            "Write an invitation to a weekend course about {x}.",
        ),
    ),
    "person": Kind(
        topics=_listed(
            "a nurse; a bus driver; a lazy student; a retired sailor; a young chess player; a village baker; a night watchman; "
            "a tired waiter; a clumsy magician; a lonely astronaut; a football coach; a shy librarian; a street musician; "
            "a curious farmer; an honest thief; a beekeeper; a ship's cook; a mountain guide; a nervous dentist; a clever tailor; "
            "a gardener; a piano teacher; a postman; a taxi driver; a firefighter; a clock maker"
        ),
        tasks=(
            "Describe an ordinary day of {x}.",
            "Tell a very short story about {x}.",
            "Write a thank-you note to {x}.",
            "Write what {x} would say about the weather.",
            "Write a letter of complaint from {x}.",
            "Give {x} a piece of advice.",
            "Write a birthday greeting for {x}.",
            "Write a job advertisement that looks for {x}.",
            "Invent a conversation with {x}.",
        ),
    ),
    "place": Kind(
        topics=_listed(
            "a small harbour; a crowded market; an old castle; a quiet library; a railway station at night; a mountain hut; "
            "a children's playground; an empty theatre; a city park; a busy airport; a farm; a hospital garden; a science museum; "
            "a corner shop; a beach in winter; a university campus; a vineyard; a zoo; an ice rink; a village square; "
            "a public swimming pool; a barber shop; a flower market; a bridge over a river"
        ),
        tasks=(
            "Describe {x}.",
            "Write a postcard from {x}.",
            "Say what one can do at {x}.",
            "Write a short review of {x} for visitors.",
            "Tell a very short story that happens at {x}.",
            "Write some rules for the visitors of {x}.",
            "Describe the sounds and smells of {x}.",
            "Write an announcement that people hear at {x}.",
        ),
    ),
}

QUESTIONS: tuple[str, ...] = _listed(
    "Is the sea salty?; Can a person live without sleep?; Is it healthy to walk every day?; Should children learn to cook?; "
    "Do all birds fly?; Is chess a sport?; Will it snow tomorrow?; Is gold heavier than wood?; Can dogs see colours?; "
    "Should shops be open on Sundays?; Is breakfast the best meal?; Do fish sleep?; Is the earth flat?; Can plants hear music?; "
    "Is a tomato a fruit?; Do cats like water?; Should homework be abolished?; Is silence better than music?; "
    "Can money make people happy?; Is ice lighter than water?; Do trees talk to each other?; Is it easy to learn Japanese?; "
    "Should one always tell the truth?; Will robots do all our work one day?; Is coffee good for you?; Can a whale drown?; "
    "Do you need talent to draw?; Is the moon bigger than the sun?"
)
"""Questions that yes, no or maybe can answer."""

WORDS: tuple[str, ...] = _listed(
    "morning; friend; quiet; simple; garden; window; always; strong; winter; happy; people; story; music; light; water; gentle; "
    "careful; small; dream; family; road; clear; never; together; surprise; remember; warm; color; patience; home"
)
"""Words that an answer about anything may have to use or to avoid."""

COMMON_WORDS: tuple[str, ...] = _listed(
    "very; good; great; important; can; people; like; make; time; always; often; also"
)
"""Words that an answer has more often than not."""

ENDINGS: tuple[str, ...] = _listed(
    "That is all.; Have a lovely day.; See you soon.; What do you think?; The end.; Thank you for reading.; "
    "And so it goes.; I hope this helps.; Until next time.; Try it yourself."
)
