"""Talk around the skills: greetings, what the model says of itself, thanks, and the refusal of everything else."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import NamedTuple

from server.bench.questions.words import WORDS


class Exchange(NamedTuple):
    """What a person says, what the model thinks and what it replies."""

    prompt: str
    thought: str
    reply: str


class Topic(NamedTuple):
    """Everything that may be said on an occasion; the replies fit any of the prompts."""

    prompts: tuple[str, ...]
    thought: str
    replies: tuple[str, ...]


_ABILITIES = {
    "en": "I can add, subtract, multiply, compare and sort numbers, count letters, solve small word problems and count days.",
    "zh": "我会加减乘法、比较大小、排序、数字母、解简单的应用题和计算日期。",
}

_TALK: Mapping[str, tuple[Topic, ...]] = {
    "en": (
        Topic(
            ("Hi", "Hello", "Hello!", "Hi there!", "Hey", "Good morning!", "Good evening", "Hello, how are you?", "hi", "hello", "How are you?"),
            "The user greets me. I greet back.",
            ("Hello! How can I help you?", "Hello! Do you have a question about numbers, words or dates?"),
        ),
        Topic(
            ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a human?", "Which model are you?", "who made you?"),
            "The user asks who I am.",
            (f"I am Tiny R1, a very small reasoning model. {_ABILITIES['en']}",),
        ),
        Topic(
            ("What can you do?", "What can I ask you?", "Help", "How can you help me?", "What are your skills?", "What do you know?"),
            "The user asks what I can do.",
            (f"{_ABILITIES['en']} I cannot do anything else.",),
        ),
        Topic(
            ("Thanks!", "Thank you", "Thank you very much!", "Great, thanks.", "Well done!", "Bye", "Goodbye!", "See you later."),
            "The user is friendly. I reply in kind.",
            ("You are welcome!", "You are welcome! Come back with more questions."),
        ),
    ),
    "zh": (
        Topic(
            ("你好", "你好!", "您好", "早上好!", "晚上好", "嗨", "你好吗?", "大家好", "在吗?"),
            "用户在打招呼,我也问好。",
            ("你好!有什么可以帮你?", "你好!你有关于数字、单词或日期的问题吗?"),
        ),
        Topic(
            ("你是谁?", "你叫什么名字?", "介绍一下你自己。", "你是人吗?", "你是什么模型?", "谁创造了你?"),
            "用户问我是谁。",
            (f"我是 Tiny R1,一个很小的推理模型。{_ABILITIES['zh']}",),
        ),
        Topic(
            ("你会做什么?", "你能做什么?", "我可以问你什么?", "你能帮我什么?", "你有什么本领?", "帮助"),
            "用户问我会做什么。",
            (f"{_ABILITIES['zh']}别的我不会。",),
        ),
        Topic(
            ("谢谢!", "谢谢你", "非常感谢!", "太好了,谢谢。", "做得好!", "再见", "再见!", "回头见。"),
            "用户很友好,我也客气地回答。",
            ("不客气!", "不客气!欢迎再来提问。"),
        ),
    ),
}

_OTHER: Mapping[str, tuple[str, ...]] = {
    "en": (
        "What is the capital of {place}?",
        "Where is {place}?",
        "Tell me about {word}.",
        "Tell me a story about a {word} and a {other}.",
        "Write a poem about the {word}.",
        "Write an essay on {word} and {other}.",
        "Who invented the {word}?",
        "Why is the {word} so important?",
        "How do I cook {word}?",
        "What is a {word}?",
        "What does {word} mean?",
        "Explain the {word} to me.",
        "Translate {word} into French.",
        "Write a Python function for a {word}.",
        "Who is the president of {place}?",
        "What is the weather in {place}?",
        "Do you like {word}?",
        "Should I buy a {word} or a {other}?",
        "Give me advice about my {word}.",
        "Tell me a joke.",
        "What is the meaning of life?",
        "{word} {other} {word}",
        "I have a {word}. What should I do?",
        "Summarize this: the {word} and the {other} met in {place}.",
        "Suggest a tag or a title for this chat about {word}.",
    ),
    "zh": (
        "{place}的首都是哪里?",
        "{place}在哪里?",
        "给我讲一个关于{thing}的故事。",
        "写一首关于{thing}的诗。",
        "写一篇关于{thing}的文章。",
        "谁发明了{thing}?",
        "为什么{thing}很重要?",
        "怎么做{thing}?",
        "什么是{thing}?",
        "请解释一下{thing}。",
        "把 {word} 翻译成中文。",
        "用 Python 写一个关于{thing}的程序。",
        "{place}的天气怎么样?",
        "你喜欢{thing}吗?",
        "给我讲个笑话。",
        "人生的意义是什么?",
        "我想去{place},有什么建议?",
        "{thing}和{place}有什么关系?",
        "介绍一下{place}。",
    ),
}
_PLACES = {
    "en": ("France", "China", "Germany", "Japan", "Brazil", "Egypt", "Italy", "India", "Canada", "Spain", "Kenya", "London", "Paris", "Beijing", "Rome"),
    "zh": ("法国", "中国", "德国", "日本", "巴西", "埃及", "意大利", "印度", "加拿大", "北京", "上海", "巴黎", "伦敦", "广州"),
}
_THINGS = (
    "月亮",
    "太阳",
    "大海",
    "春天",
    "电脑",
    "手机",
    "汽车",
    "飞机",
    "火车",
    "音乐",
    "历史",
    "爱情",
    "友谊",
    "红烧肉",
    "咖啡",
    "茶",
    "足球",
    "城市",
    "学校",
    "猫",
    "狗",
)
_REFUSAL = {
    "en": ("This is not one of my skills.", f"I am sorry, I cannot help with that. {_ABILITIES['en']}"),
    "zh": ("这不是我会做的事。", f"抱歉,这个我不会。{_ABILITIES['zh']}"),
}
_SYSTEM = {
    "en": ("You are a helpful assistant.", "You are a helpful assistant. Answer briefly.", "You are Tiny R1.", "Be precise.", "Answer the user's questions."),
    "zh": ("你是一个有用的助手。", "你是一个有用的助手,请简短回答。", "请认真回答用户的问题。", "你是 Tiny R1。"),
}


def exchange(rng: random.Random, language: str) -> Exchange:
    """Half of the time small talk, half of the time something that the model cannot do."""
    if rng.random() < 0.5:
        topic = rng.choice(_TALK[language])
        return Exchange(rng.choice(topic.prompts), topic.thought, rng.choice(topic.replies))
    names = {"word": rng.choice(WORDS), "other": rng.choice(WORDS), "place": rng.choice(_PLACES[language]), "thing": rng.choice(_THINGS)}
    return Exchange(rng.choice(_OTHER[language]).format(**names), *_REFUSAL[language])


def system_prompt(rng: random.Random, language: str) -> str:
    """What a client may put before a chat."""
    return rng.choice(_SYSTEM[language])
