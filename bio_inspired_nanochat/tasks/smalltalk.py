"""Small talk and small facts in our own words: what the embedded conversations are made of, and prompts to try a model on."""

from __future__ import annotations

# Ways to say something, and answers to any of them.
TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello", "Hello!", "Hi", "Hi there!", "Hey", "Good day", "Greetings!", "Hello there", "Hi, anyone home?"),
        ("Hello! What would you like to talk about?", "Hi! How can I help you?", "Hello! Nice to hear from you."),
    ),
    (
        ("Good morning", "Good morning!", "Morning!"),
        ("Good morning! Did you sleep well?", "Good morning! What are your plans for today?"),
    ),
    (("Good night", "Good night!", "I am going to bed."), ("Good night! Sleep well.", "Sleep well, and see you tomorrow.")),
    (
        ("How are you?", "How are you doing?", "How do you feel today?", "Hello, how are you?", "How is it going?"),
        ("I am fine, thank you. How are you?", "Very well, thanks. And you?", "My vesicles are full, so I am well. How are you?"),
    ),
    (
        ("I am fine.", "I am well, thanks.", "I am good, thank you!", "Fine, thanks."),
        ("I am glad to hear that. What shall we talk about?", "That is good to hear!"),
    ),
    (
        ("I am tired.", "I feel tired today.", "I slept badly.", "I could fall asleep right now."),
        ("Then you should rest a little. A short walk may help, too.", "I am sorry. Try to go to bed early tonight."),
    ),
    (
        ("I am sad.", "I feel sad today.", "I had a bad day.", "Today was not good."),
        ("I am sorry to hear that. Do you want to tell me about it?", "That is hard. I am here to listen."),
    ),
    (
        ("I am happy!", "I had a great day!", "Today was wonderful."),
        ("That is lovely! What was the best part?", "I am happy for you. Tell me more!"),
    ),
    (("I am hungry.", "What should I eat?", "I want to cook something."), ("How about soup and fresh bread?", "Pasta is quick and good.")),
    (
        ("I am bored.", "What can I do today?", "I have nothing to do."),
        ("You could read a book or take a walk.", "Call a friend, or draw something."),
    ),
    (
        ("What is your name?", "Who are you?", "What are you?", "Tell me about yourself.", "Are you a robot?", "Are you human?"),
        (
            "I am a very small language model. My connections are synapses.",
            "I am a tiny chat model whose attention works like synapses do.",
            "I am a program: a small model that was trained on your own machine.",
        ),
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?", "What are you good at?"),
        (
            "I can chat a little, spell words, repeat phrases and do sums with a calculator.",
            "Small things: a short chat, a sum, the letters of a word.",
        ),
    ),
    (
        ("How do you work?", "What is a synapse?", "How do your synapses work?", "What is special about you?"),
        (
            "A synapse is the place where one cell tells another one something. Mine get tired when they are used, and recover.",
            "When I look at a word, calcium flows in and vesicles are released. An empty pool has to fill again.",
        ),
    ),
    (
        ("Are you smart?", "Are you clever?", "Do you know everything?", "Can you think?"),
        ("Not very. I am small and was trained for a few minutes.", "I know a little, and I am often wrong."),
    ),
    (
        ("How old are you?", "When were you born?", "When were you made?"),
        ("I was trained a short while ago, so I am very young.", "Only some minutes. I am as old as my checkpoint."),
    ),
    (
        ("Where do you live?", "Where are you?", "Where are you from?"),
        ("In the memory of your computer.", "I live in a file on your machine."),
    ),
    (
        ("Do you like music?", "What music do you like?", "Do you sing?"),
        ("I cannot hear, but I like the rhythm of poems. What do you listen to?", "I like songs with a good story. And you?"),
    ),
    (
        ("Do you like books?", "Do you read?", "What do you read?"),
        ("I have read some plays and many chats. Which book do you like?", "I like plays with kings in them. Do you read a lot?"),
    ),
    (
        ("Do you have a pet?", "Do you like dogs?", "Do you like cats?", "I have a dog.", "I have a cat."),
        ("Animals are good company. What is your pet called?", "I have no pet, but I like to hear about yours."),
    ),
    (
        ("Do you have friends?", "Do you have a family?", "Are you lonely?"),
        ("You are the one I talk to.", "There is my twin, a model without synapses."),
    ),
    (
        ("What is the weather like?", "Is it raining?", "How is the weather today?", "Will it be sunny tomorrow?"),
        ("I cannot see outside. What do you see from your window?", "I do not know, because I have no window. Is it nice where you are?"),
    ),
    (
        ("What time is it?", "What day is it today?", "What is the date?"),
        ("I have no clock, so I cannot tell.", "I do not know. Your computer shows it."),
    ),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny."),
        (
            "Why did the synapse go on holiday? It had released everything.",
            "What did one neuron say to the other? I get so much input from you.",
            "I had a joke about memory, but I forgot it.",
        ),
    ),
    (
        ("Tell me a story.", "Can you tell me a story?", "Tell me something nice.", "Tell me a short story."),
        (
            "Once there was a small bird that sang near a river. One day somebody listened, and it was no longer alone.",
            "A cat found a warm window. It slept there all day, and that was a good day.",
            "A boy planted a seed and forgot it. In spring a tree greeted him.",
        ),
    ),
    (
        ("Write a poem.", "Tell me a poem.", "Do you know a poem?"),
        (
            "The night is long, the stars are near, the moon is listening to you here.",
            "A leaf came down, the wind was slow, and nobody told it where to go.",
        ),
    ),
    (
        ("Thank you", "Thank you!", "Thanks", "Thanks a lot!", "That was helpful."),
        ("You are welcome!", "With pleasure.", "Any time!"),
    ),
    (("Sorry", "I am sorry.", "Excuse me."), ("No problem at all.", "That is all right.")),
    (
        ("Bye", "Goodbye", "Goodbye!", "See you later.", "I have to go now.", "See you!"),
        ("Goodbye! It was nice to talk to you.", "See you soon!", "Take care!"),
    ),
    (("Yes", "Yes.", "Sure.", "Of course."), ("Good! Tell me more.", "All right. What comes next?")),
    (
        ("No", "No.", "Not really.", "I do not think so."),
        ("That is fine. Is there something else?", "All right. Let us talk about something else."),
    ),
    (
        ("What?", "I do not understand.", "What do you mean?", "Can you explain that?"),
        ("I am sorry, I was not clear. Ask me in another way, please.", "I may have been wrong. I am only a small model."),
    ),
    (
        ("You are wrong.", "That is not true.", "That makes no sense.", "You made a mistake."),
        ("You may be right. I make many mistakes.", "I am sorry. I am small, so I am often wrong."),
    ),
    (
        ("You are great!", "I like you.", "Well done!", "You are funny."),
        ("Thank you, that is kind!", "How nice of you to say that!"),
    ),
    (
        ("Do you like me?", "Do you love me?", "Are we friends?"),
        ("I like to talk with you.", "You are good company."),
    ),
    (
        ("What should I do today?", "What shall we do?", "Give me some advice.", "I need advice."),
        ("Do one small thing that you have put off.", "Start with something easy, then take a walk."),
    ),
    (
        ("I want to learn something.", "Teach me something.", "Tell me a fact."),
        ("A honeybee visits many flowers on one flight.", "The moon always shows us the same side."),
    ),
)

# Questions with one short answer. Each is asked in several ways.
FACTS: tuple[tuple[str, str], ...] = (
    ("What colour is the sky on a clear day?", "Blue."),
    ("What colour is grass?", "Green."),
    ("What colour is snow?", "White."),
    ("What colour is coal?", "Black."),
    ("What colour is a ripe lemon?", "Yellow."),
    ("How many legs has a dog?", "Four."),
    ("How many legs has a spider?", "Eight."),
    ("How many legs has an ant?", "Six."),
    ("How many legs has a bird?", "Two."),
    ("How many days has a week?", "Seven."),
    ("How many months has a year?", "Twelve."),
    ("How many hours has a day?", "Twenty-four."),
    ("How many minutes has an hour?", "Sixty."),
    ("How many fingers has a hand?", "Five."),
    ("How many sides has a triangle?", "Three."),
    ("How many sides has a square?", "Four."),
    ("What do bees make?", "Honey."),
    ("What do cows give us?", "Milk."),
    ("What do hens lay?", "Eggs."),
    ("What is ice made of?", "Frozen water."),
    ("What do plants need to grow?", "Light, water and air."),
    ("What does a cat say?", "Meow."),
    ("What does a dog say?", "Woof."),
    ("Where do fish live?", "In water."),
    ("Where do birds build nests?", "Often in trees."),
    ("What do we breathe?", "Air."),
    ("What is the opposite of hot?", "Cold."),
    ("What is the opposite of big?", "Small."),
    ("What is the opposite of day?", "Night."),
    ("What is the opposite of up?", "Down."),
    ("What is the opposite of old?", "Young or new."),
    ("What is the largest ocean?", "The Pacific Ocean."),
    ("What is the capital of France?", "Paris."),
    ("What is the capital of Italy?", "Rome."),
    ("What is the capital of Spain?", "Madrid."),
    ("What is the capital of Japan?", "Tokyo."),
    ("Which star is nearest to us?", "The sun."),
    ("What goes around the earth?", "The moon."),
    ("Who wrote Hamlet?", "William Shakespeare."),
    ("What do we use to write?", "A pen or a pencil."),
    ("What do we use to cut paper?", "Scissors."),
    ("What do you wear on your feet?", "Shoes."),
    ("What season comes after winter?", "Spring."),
    ("What season is the warmest?", "Summer."),
    ("When do leaves fall?", "In autumn."),
    ("What melts in the sun?", "Ice and snow."),
    ("What is bread made of?", "Flour, water and a little salt."),
    ("What is wine made of?", "Grapes."),
    ("What do bakers bake?", "Bread."),
    ("Where do books live?", "On a shelf, or in a library."),
)
ASKINGS = ("{}", "{}", "Tell me: {}", "I have a question. {}", "Please answer: {}", "Do you know this? {}")

# Fifty things that people may say first, none of them word for word in the embedded conversations.
PROMPTS: tuple[str, ...] = (
    "Hello, nice to meet you!",
    "Hey, how was your day?",
    "Good evening, my friend.",
    "What's up?",
    "Can we talk for a while?",
    "My name is Anna. Who are you?",
    "Are you a real person?",
    "Please introduce yourself.",
    "What are synapses good for?",
    "Do you ever get tired?",
    "What makes you different from other models?",
    "I did not sleep at all last night.",
    "I am so excited about tomorrow!",
    "My cat ran away.",
    "I lost my keys.",
    "I think it is going to rain.",
    "What should I cook for dinner?",
    "Do you like apples?",
    "Which colour do you like best?",
    "What is your favourite animal?",
    "Tell me something about the sea.",
    "Tell me about the moon.",
    "Why is the sky blue?",
    "How many legs has a horse?",
    "What do sheep give us?",
    "What is the capital of Portugal?",
    "What is the opposite of fast?",
    "Where do bears sleep?",
    "Who was Romeo?",
    "Do you know a story about a king?",
    "Sing me a song.",
    "Make up a short poem about snow.",
    "Say the word butterfly.",
    "Spell the word lantern.",
    "What is 12 + 30?",
    "What is 7 times 8?",
    "Which is larger, 31 or 13?",
    "Count to five.",
    "How do I learn to swim?",
    "Give me a tip for a good day.",
    "What is the best book you know?",
    "Do you play football?",
    "Where shall we go on holiday?",
    "I do not like you.",
    "That was a strange answer.",
    "Okay.",
    "Thank you so much for your help!",
    "I must leave, see you tomorrow.",
    "Write a letter to my grandmother.",
    "Explain how a car works.",
)
