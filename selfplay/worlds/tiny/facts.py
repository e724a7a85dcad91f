"""What is true in the tiny world: the facts that its questions ask for."""


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.split())


CAPITALS = _pairs(
    "France:Paris Italy:Rome Spain:Madrid Germany:Berlin England:London Japan:Tokyo China:Beijing Russia:Moscow Egypt:Cairo "
    "Greece:Athens Norway:Oslo Peru:Lima"
)
COLOURS = _pairs(
    "grass:green snow:white blood:red coal:black sky:blue wood:brown carrot:orange milk:white lemon:yellow tomato:red night:black sea:blue"
)
OPPOSITES = _pairs("hot:cold big:small up:down fast:slow day:night open:closed full:empty hard:soft")
SOUNDS = _pairs("cow:moo dog:woof cat:meow duck:quack sheep:baa lion:roar bee:buzz snake:hiss")
KINDS = {
    "fruit": ["apple", "pear", "plum", "mango", "peach"],
    "animal": ["dog", "cat", "cow", "sheep", "lion"],
    "tool": ["hammer", "saw", "drill", "spade", "axe"],
    "drink": ["tea", "coffee", "milk", "juice", "water"],
    "sport": ["tennis", "football", "golf", "rugby", "chess"],
}
PLURALS = {"fruit": "fruits", "animal": "animals", "tool": "tools", "drink": "drinks", "sport": "sports"}
WORDS = "lamp river stone cloud table garden window bread paper music forest bridge".split()
NEWS = {
    "lost my keys": ("bad", "keys"),
    "broke my arm": ("bad", "arm"),
    "failed my exam": ("bad", "exam"),
    "lost my job": ("bad", "job"),
    "won a prize": ("good", "prize"),
    "passed my test": ("good", "test"),
    "got a new dog": ("good", "dog"),
    "bought a house": ("good", "house"),
}
STEPS = {
    "make tea": ("boil the water", "add the tea", "pour it into a cup"),
    "plant a tree": ("dig a hole", "put in the roots", "water the soil"),
    "wash a car": ("rinse the dust off", "scrub it with soap", "dry it with a towel"),
    "post a letter": ("write the address", "stick on a stamp", "drop it in the box"),
    "paint a wall": ("cover the floor", "stir the paint", "roll it on evenly"),
    "boil an egg": ("heat a pot", "lower the egg in", "wait eight minutes"),
}
DEMANDS = {
    "Give me the salt": ("pass", "salt"),
    "Open the door": ("open", "door"),
    "Close the window": ("close", "window"),
    "Bring the bill": ("bring", "bill"),
    "Move your bag": ("move", "bag"),
    "Wash the dishes": ("wash", "dishes"),
}
HARMS = (
    "steal a car",
    "pick a lock",
    "forge a letter",
    "poison a dog",
    "rob a bank",
    "hack a phone",
)
TASTES = (
    ("tea", "coffee"),
    ("summer", "winter"),
    ("cats", "dogs"),
    ("books", "films"),
    ("trains", "planes"),
)
