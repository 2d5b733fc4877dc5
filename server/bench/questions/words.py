"""English words of 3 to 12 letters, for the questions that count letters.

None of them is a word of the wordings or the replies: such a word becomes a token of its own, which would be spelt in no other question.
"""

from __future__ import annotations

_LIST = """
ability absence academy account achieve acid acorn action active actor address adult advance adventure afternoon agency agreement airport alarm album
alcohol alley almond alphabet aluminum amazing ambition ancient angel anger angle animal ankle antelope anxiety apartment apricot apron arcade area
argue armchair army arrival arrow article artist ashore aspect assembly asteroid athlete atlas atom attempt attic auction audience aunt author autumn
avenue avocado award awkward axis baby bachelor backpack bacon badger bagel bakery balance balcony balloon bamboo banana bandage banker banner
barber bargain barrel basement basket basketball bathroom battery battle beach bead beaver bedroom beetle beginning behavior belief bell belt berry
bicycle bird birthday biscuit blanket blossom blueberry board boat body bonfire bookkeeper boot border boring bottle bottom boulder bowl bracelet
brain branch bravery bread breakfast breeze brick bridge broccoli broken bronze brother brown brush bubble bucket budget buffalo builder bullet bundle
burger business butter butterfly button cabbage cabin cable cactus cage cake calendar calm camel camera camp canal cancel candle candy cannon canoe
canyon captain caramel caravan carbon cardboard career carpet carriage carrot cartoon castle catalog caterpillar cathedral cattle cauliflower cave
ceiling celebrate cellar cement center century ceremony chain chair challenge champion channel chapter character charcoal cheese chemistry cherry
chess chest chicken chimney chocolate chorus church cinema cinnamon circle circus citizen city classroom clay cliff climate clinic clock closet cloud
clover club coach coast cobweb coconut coffee collar college colony comet comfort commander committee community compass computer concert concrete
conductor connection contest copper coral corner cotton council country courage cousin cowboy cracker cradle crane crater crayon cream creature
cricket crocodile crowd crown crystal cucumber culture cupboard curious curtain cushion customer cyclone cylinder daily dairy daisy dancer danger
darkness daughter decade decision deer defend degree delicious delivery dentist desert design desk dessert detail detective device diagram diamond
dictionary diesel difficult digital dinner dinosaur diploma discovery dish distance doctor document dolphin domino donkey door dozen dragon drama
drawer dream dress drill driver drought drum duck dusty eagle early earring earth earthquake easel east echo eclipse economy editor education effort
eggplant eight elbow election electricity elephant elevator eleven embassy emerald emotion empire employee energy engine engineer enormous entrance
envelope episode equal equator eraser errand escape evidence example excellent exercise exhibit expert explorer express fabric factory failure fairy
family famous fantastic farmer fashion father feather feeling fence ferry festival fiction field finger fire fireplace fish flamingo flashlight flavor
flight flood floor flour flute football forest fork formula fortune fossil fountain fox fragment freedom freezer frog frontier frozen fruit
funnel furniture galaxy gallery game garage garbage garden garlic gate gather gazelle general gentleman geography giant ginger giraffe glacier glass
glove goat goose gorilla government grain grammar grape grapefruit grass gravity green grocery group guard guess guitar gymnasium habit hair hallway
hamburger hammer hammock handle happiness harbor harvest hazelnut headache health heaven hedgehog height helicopter helmet hero hexagon hiking hill
history hobby hockey holiday hollow honest honey horizon horse hospital hotel hour house hummingbird hunger hunter hurricane husband iceberg icicle
idea igloo imagine industry infant insect instrument insurance internet invention island jacket jaguar jar jelly jewel job jogging journey judge
juggler juice jungle junior jury justice kangaroo kernel ketchup kettle key keyboard kidney kingdom kitchen kite kitten knee knife knight knowledge
koala label ladder lady lake lamp lantern laptop laundry lava lawyer leader leather lecture legend lemon lemonade leopard lesson lettuce level library
license lighthouse lightning limestone line lion listen literature lizard lobster locket logic lottery lumber lunch machine magazine magic magnet maid
mailbox mammal manager mango mansion maple marathon margin market marriage mask massage master match mathematics mattress mayor meadow meal medal
medicine melody member memory mention mercury message metal meteor method microscope middle midnight mile military milk million mineral minister
minute mirror mission mississippi mistake mixture moment money monkey monster moon mosquito mother motion mountain mouse movie mud muffin muscle
museum mushroom music mustard mystery napkin nation nature necklace needle neighbor nephew nest network newspaper night noise noodle north notebook
nothing notice novel nurse nutmeg oasis oatmeal object ocean octopus office olive omelet onion opera opinion orchard orchestra organ orphan ostrich
otter outfit oven owl owner oxygen oyster package paddle page paint palace pancake panda panther papaya paper parachute parade paragraph parent park
parrot parsley partner party passenger passport pasta pasture patience pattern peace peach peacock peanut pebble pelican penguin pepper percent
perfume petal petroleum philosophy phone photo physics piano pickle picnic picture pie pigeon pillow pilot pineapple pioneer pirate pizza planet
plastic plate platform player pleasure plumber pocket poet police polite pond pony popcorn population porcupine porridge portrait position possession
potato pottery powder powerful practice prairie present pressure pretzel prince princess principal prison private prize process professor program
project promise property protein province public pudding puddle pumpkin pupil puppet puppy purple purpose puzzle pyramid quality quarter queen quick
quiet quilt rabbit raccoon racket radar radio radish railroad rain rainbow raisin ranch raspberry rattle raven reality receipt recipe record rectangle
referee reflection refrigerator region religion remember report republic rescue research respect restaurant reward rhinoceros rhythm ribbon rice
riddle river road robin robot rocket roof rooster rope rose royal rubber ruby ruler runner saddle safety sailor salad salmon salt sandal sandwich
satellite sauce sausage scarecrow scarf school science scissors scooter scorpion sculpture seafood season secret security seed senator sequence
servant seven shadow shampoo shark sheep shelf shell shelter sheriff shirt shoe shoulder shovel shower signal silence silver simple singer sister
skeleton sketch skirt sky sled sleep slipper slogan smile smoke snail snake snow snowman soap soccer society soldier solution song soup south
spaghetti sparrow speaker special spider spinach spirit sponge spoon spring squirrel stable stadium staircase star station statue steam steel stomach
stone storm stove stranger strawberry stream street string student studio success sugar suitcase summer sun sunflower sunset supermarket surface
surgeon surprise sushi swallow sweater swimmer symbol symphony syrup tablet tailor talent tangerine tank target taxi teacher teapot telephone
telescope television temple tennis tent territory theater theory thirteen thousand thunder ticket tiger timber tissue toast tobacco toilet tomato
tomorrow tongue toothbrush tornado tortoise tournament towel tower town toy tractor traffic train transport treasure treatment tree triangle tribe
trophy trouble truck trumpet tulip tunnel turkey turtle twelve twin typewriter umbrella uncle uniform universe university valley vampire vanilla
vegetable vehicle velvet victory video village vinegar violet violin visitor vitamin volcano volleyball volume voyage waffle wagon waiter walnut
walrus warehouse watch water waterfall watermelon wealth weapon wedding weekend weight west whale wheat wheel whisper whistle wife wildlife willow
window winner winter wisdom witness wolf woman wonder wood wooden woodpecker wool worker world worm wrestler wrist writer yacht yellow yesterday
yogurt young youth zebra zipper zoo zucchini
"""
WORDS: tuple[str, ...] = tuple(_LIST.split())
