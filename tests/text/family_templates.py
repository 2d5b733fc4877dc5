"""Chat templates written as the families' are: the same features of Jinja, in few words of our own."""

from __future__ import annotations

from server.text.tools.deepseek import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR

# V2's: roles in words, BOS and EOS by name.
DEEPSEEK_V2 = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}
{%- for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'assistant' %}{{ 'Assistant: ' ~ message['content'] ~ eos_token }}
{%- elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

# V3's and R1's: system texts gathered first, calls only where the content is null, arguments joined as text, thoughts cut from earlier replies.
DEEPSEEK_V3 = """\
{%- set ns = namespace(system='', in_tool=false, first=true) -%}
{%- for message in messages %}{% if message['role'] == 'system' %}{% set ns.system = ns.system + message['content'] %}{% endif %}{% endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}{%- set ns.in_tool = false -%}{{ '<|U|>' + message['content'] }}{%- endif -%}
  {%- if message['role'] == 'assistant' and message['content'] is none -%}
    {%- set ns.in_tool = false -%}{%- set ns.first = true -%}
    {%- for call in message['tool_calls'] -%}
      {{- ('<|A|><|calls|>' if ns.first else '\\n') + '<|call|>' + call['type'] + '<|sep|>' + call['function']['name'] + '\\n```json\\n' -}}
      {{- call['function']['arguments'] + '\\n```<|end|>' -}}{%- set ns.first = false -%}
    {%- endfor -%}{{ '<|/calls|>' + eos_token }}
  {%- endif -%}
  {%- if message['role'] == 'assistant' and message['content'] is not none -%}
    {%- set content = message['content'] -%}
    {%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1] -%}{%- endif -%}
    {{- ('<|/outputs|>' if ns.in_tool else '<|A|>') + content + eos_token -}}{%- set ns.in_tool = false -%}
  {%- endif -%}
  {%- if message['role'] == 'tool' -%}
    {{- '\\n<|output|>' if ns.in_tool else '<|outputs|><|output|>' -}}{{ message['content'] + '<|/output|>' }}{%- set ns.in_tool = true -%}
  {%- endif -%}
{%- endfor -%}
{%- if ns.in_tool -%}{{ '<|/outputs|>' }}{%- endif -%}
{%- if add_generation_prompt and not ns.in_tool -%}{{ '<|A|>' }}{%- endif -%}"""
for short, token in (("<|calls|>", CALLS_BEGIN), ("<|/calls|>", CALLS_END), ("<|call|>", CALL_BEGIN), ("<|end|>", CALL_END), ("<|sep|>", SEPARATOR)):
    DEEPSEEK_V3 = DEEPSEEK_V3.replace(short, token)
DEEPSEEK_R1 = DEEPSEEK_V3.replace("{{ '<|A|>' }}{%- endif -%}", "{{ '<|A|><think>\\n' }}{%- endif -%}")

# Qwen2.5's and Qwen3's: ChatML with tools as JSON lines, results of tools in one user's turn, thoughts kept behind the last question.
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
    {{- "<tools>" }}{% for tool in tools %}{{ "\\n" }}{{ tool | tojson }}{% endfor %}{{ "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}{% set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- set content = message.content %}
        {%- if not thought and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}{{ content }}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{ '\\n' }}{% endif %}
            {%- if call.function %}{% set call = call.function %}{% endif %}
            {{- '<tool_call>\\n{"name": "' }}{{ call.name }}{{ '", "arguments": ' }}
            {%- if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}{{ '}\\n</tool_call>' }}
        {%- endfor %}{{ '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

# GLM-4.5's: no EOS between turns, a macro that flattens contents, arguments as key and value.
GLM = """\
[gMASK]<sop>
{%- if tools -%}<|system|>
<tools>
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
</tools>{%- endif -%}
{%- macro visible(content) -%}
    {%- if content is string -%}{{ content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}{%- if item is mapping and item.type == 'text' -%}{{ item.text }}{%- endif -%}{%- endfor -%}
    {%- else -%}{{ content }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}<|user|>
{{ visible(m.content) }}{{ '/nothink' if (enable_thinking is defined and not enable_thinking and not visible(m.content).endswith('/nothink')) else '' }}
{%- elif m.role == 'assistant' -%}<|assistant|>
{{ '<think>' + m.reasoning_content.strip() + '</think>' if m.reasoning_content is string and loop.index0 > ns.last else '<think></think>' }}
{%- if visible(m.content).strip() -%}{{ '\\n' + visible(m.content).strip() }}{%- endif -%}
{%- if m.tool_calls -%}{% for tc in m.tool_calls %}{%- if tc.function %}{% set tc = tc.function %}{% endif %}
{{ '\\n<tool_call>' + tc.name }}{% set args = tc.arguments %}{% for k, v in args.items() %}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>{% endfor %}
</tool_call>{% endfor %}{% endif %}
{%- elif m.role == 'tool' -%}
{%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}<|observation|>{%- endif %}
<tool_response>
{{ m.content }}
</tool_response>
{%- elif m.role == 'system' -%}<|system|>
{{ visible(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{{ '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' }}{%- endif -%}"""

# Mixtral's: the system text goes into the first question, turns alternate, EOS ends replies.
MIXTRAL = """\
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set loop_messages = messages[1:] %}
{%- else %}{% set loop_messages = messages %}{% endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate.') }}{% endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system is defined %}{{ ' [INST] ' + system + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}{% endif %}
    {%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}
    {%- else %}{{ raise_exception('Only users and assistants speak.') }}{% endif %}
{%- endfor %}"""

# Llama 3.1's: a date, tools as indented JSON in the first question, one call a turn, results from the role ipython.
LLAMA31 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system_message = "" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}{% if tools is not none %}{{ "Environment: ipython\\n" }}{% endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- set first = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}{% for t in tools %}{{ t | tojson(indent=4) }}{{ "\\n\\n" }}{% endfor %}{{ first + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception("One call at a time.") }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{ message.content | tojson }}{% else %}{{ message.content }}{% endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# DeepSeek V3.1's: no fences, and a switch for the thoughts.
DEEPSEEK_V31 = f"""\
{{%- if not thinking is defined %}}{{% set thinking = false %}}{{% endif %}}{{{{ bos_token }}}}
{{%- for m in messages %}}{{% if m.role == 'system' %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}
{{%- for m in messages %}}
    {{%- if m.role == 'user' %}}{{{{ '<U>' + m.content }}}}
    {{%- elif m.role == 'assistant' and m.tool_calls %}}{{{{ '<A></think>' + (m.content or '') + '{CALLS_BEGIN}' }}}}
        {{%- for call in m.tool_calls %}}{{{{ '{CALL_BEGIN}' + call.function.name + '{SEPARATOR}' + call.function.arguments + '{CALL_END}' }}}}{{% endfor %}}
        {{{{- '{CALLS_END}' + eos_token }}}}
    {{%- elif m.role == 'assistant' %}}{{{{ '<A>' + m.content.split('</think>')[-1] + eos_token }}}}
    {{%- elif m.role == 'tool' %}}{{{{ '<T>' + m.content }}}}{{% endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{ '<A>' + ('<think>' if thinking else '</think>') }}}}{{% endif %}}"""

# Mistral Nemo's: tools before the last question, calls as a list, ids of nine letters and digits.
MISTRAL = """\
{{- bos_token }}
{%- set last = messages | selectattr('role', 'equalto', 'user') | list | last %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if tools is not none and m == last %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
        {{- '[INST]' + m.content + '[/INST]' }}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}{{ '[TOOL_CALLS][' }}
        {%- for call in m.tool_calls %}
            {%- if call.id | length != 9 %}{{ raise_exception('Ids have nine characters.') }}{% endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{ ', ' if not loop.last else ']' + eos_token }}
        {%- endfor %}
    {%- elif m.role == 'tool' %}
        {%- if m.tool_call_id | length != 9 %}{{ raise_exception('Ids have nine characters.') }}{% endif %}
        {{- '[TOOL_RESULTS]' + m.content + m.tool_call_id + '[/TOOL_RESULTS]' }}
    {%- else %}{{ m.content + eos_token }}{% endif %}
{%- endfor %}"""

# Mistral Small 3.2's way of calls.
MISTRAL_NAMED = """\
{{- bos_token }}{% if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content or '' }}{% endif %}
    {%- for call in m.tool_calls or [] %}{{ '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}{% endfor %}
    {%- if m.role == 'assistant' %}{{ eos_token }}{% endif %}
{%- endfor %}"""

# Qwen3-Coder's: arguments as tags.
QWEN_CODER = """\
{%- if tools %}{{ '<|im_start|>system\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n<name>' + tool.function.name + '</name>' }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' + (m.content or '') }}
    {%- for call in m.tool_calls or [] %}
        {{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
        {%- for key, value in call.function.arguments | items %}
            {{- '<parameter=' + key + '>\\n' }}{{ value | tojson if value is mapping else value | string }}{{ '\\n</parameter>\\n' }}
        {%- endfor %}{{ '</function>\\n</tool_call>' }}
    {%- endfor %}{{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Kimi K2's: calls in a section, with ids that the template writes itself.
KIMI = """\
{%- if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}
{%- for m in messages %}<|im_{{ m.role }}|>
    {%- if m.tool_calls %}{{ m.content or '' }}<|tool_calls_section_begin|>
        {%- for call in m.tool_calls %}<|tool_call_begin|>functions.{{ call.function.name }}:{{ loop.index0 }}<|tool_call_argument_begin|>
            {{- call.function.arguments | tojson }}<|tool_call_end|>
        {%- endfor %}<|tool_calls_section_end|>
    {%- elif m.role == 'tool' %}## Return of {{ m.tool_call_id }}: {{ m.content }}{% else %}{{ m.content }}{% endif %}<|im_end|>
{%- endfor %}"""
