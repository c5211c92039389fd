//! Chat templates made to hang or to eat memory: whatever they do, compiling and rendering end within a second and 256 MiB.
//!
//! The bounds of `data/template_guard.rs`, measured: processor time, and live bytes by a counting allocator.

use std::collections::BTreeMap;
use std::time::Duration;

use rft_engine::data::template::ChatTemplate;
use serde_json::{Map, json};

#[allow(dead_code)]
#[path = "support/fuzz.rs"]
mod fuzz;

#[global_allocator]
static ALLOCATOR: fuzz::Counting = fuzz::Counting;

const TIME: Duration = Duration::from_secs(1);
const MEMORY: usize = 256 << 20;

/// Compiles and renders a template within the bounds; its text, or why there is none.
fn bounded(what: &str, source: &str) -> Result<String, String> {
    let _turn = fuzz::alone();
    let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]);
    let (result, bytes, time) = fuzz::measured(|| {
        ChatTemplate::new(source, &BTreeMap::new())
            .and_then(|t| t.render(&messages, None, &Map::new(), true))
            .map_err(|e| e.to_string())
    });
    let end = result.as_ref().map_or_else(
        |e| e.lines().next().unwrap_or_default().chars().take(100).collect(),
        |text| format!("{} bytes of text", text.len()),
    );
    println!(
        "{what}: {:.0} MiB, {:.0} ms: {end}",
        bytes as f64 / f64::from(1 << 20),
        time.as_secs_f64() * 1e3
    );
    assert!(bytes <= MEMORY, "{what} takes {bytes} bytes");
    assert!(time <= TIME, "{what} takes {time:?}");
    result
}

/// `times` rounds that change `ns.x`, which begins as `x`, and then `end`.
fn rounds(x: &str, times: u32, body: &str, end: &str) -> String {
    format!("{{% set ns = namespace(x={x}, y=0) %}}{{% for i in range({times}) %}}{body}{{% endfor %}}{end}")
}

#[test]
fn values_that_double_are_refused() {
    let double = "{% set ns.x = ns.x + ns.x %}";
    let share = "{% set ns.x = [ns.x, ns.x] %}";
    for (what, source) in [
        ("lists that double", rounds("[1]", 40, double, "")),
        ("lists that double, printed", rounds("[1]", 40, double, "{{ ns.x }}")),
        ("strings that double", rounds("'xxxxxxxx'", 60, double, "")),
        ("strings that double by ~", rounds("'xxxxxxxx'", 60, "{% set ns.x = ns.x ~ ns.x %}", "")),
        ("tuples that double", rounds("(1, 2)", 60, double, "")),
        ("lists repeated", rounds("[1]", 40, "{% set ns.x = ns.x * 10 %}", "{{ ns.x | length }}")),
        ("a list repeated", "{{ ([1] * 99999999) | length }}".into()),
        ("strings repeated", "{{ ('x' * 99999999) * 99999999 }}".into()),
        ("shared lists", rounds("[1]", 60, share, "")),
        ("shared lists, printed", rounds("[1]", 60, share, "{{ ns.x }}")),
        (
            "shared lists, compared",
            rounds("[1]", 60, &format!("{share}{{% set ns.y = [ns.y, ns.y] %}}"), "{{ ns.x == ns.y }}"),
        ),
        ("shared lists as json", rounds("[1]", 60, share, "{{ ns.x | tojson }}")),
        ("shared maps", rounds("1", 60, "{% set ns.x = {'a': ns.x, 'b': ns.x} %}", "{{ ns.x | string }}")),
        ("shared tuples", rounds("1", 60, "{% set ns.x = (ns.x, ns.x) %}", "{{ ns.x ~ '' }}")),
        (
            "shared through dict",
            rounds("{'a': 1}", 60, "{% set ns.x = dict(a=ns.x, b=ns.x) %}", "{{ ns.x }}"),
        ),
        (
            "shared through filters",
            rounds("[1]", 60, "{% set ns.x = [ns.x] | chain([ns.x]) %}", "{{ ns.x | pprint }}"),
        ),
        (
            "shared through zip",
            rounds(
                "[1]",
                60,
                "{% set ns.x = ns.x | zip(ns.x) | list %}{% set ns.x = [ns.x, ns.x] %}",
                "{{ ns.x }}",
            ),
        ),
        (
            "replaced by more",
            rounds("'aaaaaaaa'", 60, "{% set ns.x = ns.x | replace('a', 'aaaaaaaa') %}", ""),
        ),
        (
            "replaced by more, Python's way",
            rounds("'aaaaaaaa'", 60, "{% set ns.x = ns.x.replace('a', 'aaaaaaaa') %}", ""),
        ),
        ("nested joins", rounds("'aaaaaaaa'", 60, "{% set ns.x = ns.x | join(ns.x) %}", "")),
        (
            "nested joins, Python's way",
            rounds("'aaaaaaaa'", 60, "{% set ns.x = ns.x.join([ns.x, ns.x, ns.x]) %}", ""),
        ),
        (
            "captured output",
            rounds("'aaaaaaaa'", 60, "{% set z %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = z %}", ""),
        ),
        (
            "a macro's output",
            "{% macro d(x) %}{{ x }}{{ x }}{{ x }}{% endmacro %}".to_string()
                + &rounds("'aaaaaaaa'", 60, "{% set ns.x = d(ns.x) %}", ""),
        ),
        ("a namespace in itself", "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}".into()),
        ("a namespace in its list", "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns }}".into()),
        (
            "a crowd of attributes",
            format!(
                "{{% set ns = namespace() %}}{}",
                (0..3000).map(|i| format!("{{% set ns.a{i}=1 %}}")).collect::<String>()
            ),
        ),
        (
            "a loop in its own items",
            "{% for a in [1] %}{% for b in [loop, loop] %}{{ loop }}{% endfor %}{% endfor %}".into(),
        ),
    ] {
        assert!(bounded(what, &source).is_err(), "{what} is not refused");
    }
}

#[test]
fn wide_formats_are_refused() {
    for (what, source) in [
        ("padding", "{{ '%0999999999d' | format(1) }}"),
        ("padding, Python's way", "{{ '{:999999999}'.format(1) }}"),
        ("digits, Python's way", "{{ '{:.999999999f}'.format(1.5) }}"),
        ("one argument many times", "{% set x = 'x' * 1000000 %}{{ ('{0}' * 100000).format(x) }}"),
        ("one list many times", "{% set x = range(90000) | list %}{{ ('{0}' * 100000).format(x) }}"),
        (
            "sets to strip by",
            "{% set x = 'ab' * 1000000 %}{% for i in range(1000) %}{{ x.strip(x) }}{% endfor %}",
        ),
        (
            "sets to trim by",
            "{% set x = 'ab' * 1000000 %}{% for i in range(1000) %}{{ x | trim(x) }}{% endfor %}",
        ),
        (
            "margins",
            "{% for a in range(99999) %}{{ 'x' | indent(99999999) }}{{ 'x' | indent(width=99999999) }}{% endfor %}",
        ),
        ("margins of json", "{{ [[[[[[1]]]]]] | tojson(indent='x' * 10000000) }}"),
        ("separators of json", "{{ (range(90000) | list) | tojson(separators=['x' * 1000000, ':']) }}"),
        ("slices", "{{ [1] | slice(999999999) }}"),
        ("batches", "{{ [1] | batch(999999999, 'x') }}"),
        ("days", "{% for i in range(99999) %}{{ strftime_now('%c' * 10000) }}{% endfor %}"),
    ] {
        assert!(bounded(what, source).is_err(), "{what} is not refused");
    }
}

/// These need not fail, but must end.
#[test]
fn long_work_ends() {
    let keys: Vec<String> = (0..2500u32).map(|i| format!("{}: 1", 2u128.pow(120) + u128::from(i))).collect();
    let colliding = format!("{{{}}}", keys.join(", "));
    let colliding_keys = format!("[{}]", keys.join(", ").replace(": 1", ""));
    let deep_with = |depth: usize, body: &str| {
        format!("{}{body}{}", "{% with a = 1 %}".repeat(depth), "{% endwith %}".repeat(depth))
    };
    let source = [
        ("endless loops", "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}".to_string()),
        ("unbounded output", "{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}".into()),
        ("unbounded plain output", format!("{{% for a in range(99999) %}}{}{{% endfor %}}", "x".repeat(100_000))),
        ("small plain output", "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}".into()),
        ("a loop over a doubled list", rounds("[1]", 18, "{% set ns.x = ns.x + ns.x %}", "{% for a in ns.x %}{% for b in ns.x %}{{ b }}{% endfor %}{% endfor %}")),
        ("loops that end at once", "{% set x = 'é' * 1000000 %}{% for a in range(99999) %}{% for b in x %}{% break %}{% endfor %}{% endfor %}".into()),
        ("loops over a list that end at once", "{% set x = range(99999) | list %}{% for a in range(99999) %}{% for b in x %}{% break %}{% endfor %}{% endfor %}".into()),
        ("loops over a map that end at once", format!("{{% set x = {colliding} %}}{{% for a in range(99999) %}}{{% for b in x %}}{{% break %}}{{% endfor %}}{{% endfor %}}")),
        ("slices of slices", rounds("range(90000) | list", 90_000, "{% set ns.x = ns.x[0:] %}", "{% for a in ns.x %}{% endfor %}")),
        ("slices that are lost", "{% set x = 'é' * 1000000 %}{% for a in range(99999) %}{% set y = x[1:2] %}{% endfor %}".into()),
        ("views of views", rounds("{'a': 1}", 90_000, "{% set ns.x = dict(ns.x.items() | list | first | list | zip([1, 2])) %}", "{{ ns.x }}")),
        ("maps of many", rounds("{}", 90_000, "{% set ns.x = dict(ns.x, **{'a' ~ i: i}) %}", "{{ ns.x }}")),
        ("long lists grown one by one", rounds("[]", 90_000, "{% set ns.x = ns.x + [i] %}", "{{ ns.x | length }}")),
        ("long strings grown one by one", rounds("''", 90_000, "{% set ns.x = ns.x + 'xxxxxxxxxxxxxxxx' %}", "{{ ns.x | length }}")),
        ("deep lists", rounds("[]", 99_999, "{% set ns.x = [ns.x] %}", "ok")),
        ("deep lists, printed", rounds("[]", 250, "{% set ns.x = [ns.x] %}", "{% for i in range(99999) %}{{ ns.x }}{{ ns.x == [ns.x] }}{% endfor %}")),
        ("many live lists", rounds("[]", 99_999, "{% set ns.x = ns.x + [range(1000) | list] %}", "")),
        ("many small lists", "{% for a in range(99999) %}{% set x = [[1], [2], [3], {'a': 1}, {'b': 2}, [], {}, [[]], [{}]] %}{% endfor %}".into()),
        ("a large list printed often", "{% set x = range(99999) | list %}{% for a in range(99999) %}{% set y = x | string %}{% endfor %}".into()),
        ("a large list compared often", "{% set x = range(99999) | list %}{% set z = x + [1] %}{% for a in range(99999) %}{% if x < z and x != z %}{% endif %}{% endfor %}".into()),
        ("a large list sought in itself", "{% set x = range(99999) | list %}{% for a in range(99999) %}{% if x in [x, z] and a in x %}{% endif %}{% endfor %}".into()),
        ("every item sought", "{% set x = range(99999) | list %}{{ x | select('in', x) | list | length }}".into()),
        ("every item mapped", "{% set x = range(99999) | list %}{{ x | map('replace', '1', 'x' * 100000) | list | length }}".into()),
        ("every item joined", "{% set x = range(99999) | list %}{{ x | map('string') | join('x' * 100000) }}".into()),
        ("sorted often", "{% set x = range(99999) | list %}{% for a in range(99999) %}{% set y = x | sort(reverse=true) | unique | list %}{% endfor %}".into()),
        ("grouped often", "{% set x = [{'a': range(999) | list}] * 100 %}{% for a in range(99999) %}{% set y = x | groupby('a') %}{% endfor %}".into()),
        ("a large map as a key", "{% set x = {'a': range(99999) | list} %}{% for a in range(99999) %}{% set y = {x: 1} %}{% set z = y[x] %}{% endfor %}".into()),
        ("colliding keys", format!("{{% for a in range(9999) %}}{{% set y = {colliding} %}}{{% endfor %}}")),
        ("colliding keys with a variable", format!("{{% for a in range(9999) %}}{{% set y = {} %}}{{% endfor %}}", colliding.replace(": 1", ": a"))),
        ("colliding keys sought", format!("{{% set x = {colliding_keys} %}}{{% for a in range(9999) %}}{{{{ (x | unique | list | length) ~ (x | groupby(0) | length) }}}}{{% endfor %}}")),
        ("unpacked often", "{% set x = range(99999) | list %}{% macro f() %}{% endmacro %}{% for a in range(99999) %}{{ f(*x) }}{% endfor %}".into()),
        ("unpacked wrongly", "{% set x = range(99999) | list %}{% set a, b = x %}".into()),
        ("arguments by name", "{% macro f() %}{{ kwargs }}{% endmacro %}{% set x = {'a': range(99999) | list} %}{% for a in range(99999) %}{{ dict(**x) | length }}{% endfor %}".into()),
        ("recursive macros", "{% macro f(x) %}{{ f(x + 1) }}{{ f(x + 1) }}{% endmacro %}{{ f(1) }}".into()),
        ("macros that double", "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}x{% endmacro %}{{ f(40) }}".into()),
        ("recursive loops", "{% for x in [[1], [2]] recursive %}{{ loop([[1], [2]]) }}{% endfor %}".into()),
        ("recursive loops under another name", "{% set s = 'é' * 100000 %}{% for x in s recursive %}{% set l = loop %}{{ l(s) }}{% endfor %}".into()),
        ("callers", "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}".to_string() + &"{% call f() %}".repeat(60) + "x" + &"{% endcall %}".repeat(60)),
        ("changed", "{% set x = range(99999) | list %}{% for a in range(99999) %}{% if loop.changed(x + [1]) %}{% endif %}{% endfor %}".into()),
        ("inclusion", "{% include '/etc/passwd' %}".into()),
        ("self-inclusion", "{% include 'chat' %}".into()),
        ("self-inclusion, forgiven", "{% for i in range(99999) %}{% include 'chat' ignore missing %}{% endfor %}".into()),
        ("self-inheritance", "{% extends 'chat' %}{% block a %}{{ super() }}{% endblock %}".into()),
        ("self-import", "{% import 'chat' as c %}{{ c }}".into()),
        ("blocks in themselves", "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}".into()),
        ("deep scopes", deep_with(200, "{% for i in range(99999) %}{% for j in range(99999) %}{{ nothing }}{% endfor %}{% endfor %}")),
        ("deep loops", "{% for i in range(9) %}".repeat(100) + "{{ nothing }}" + &"{% endfor %}".repeat(100)),
        ("regions", "{% for i in range(99999) %}{% generation %}{{ 'x' * 1000 }}{% endgeneration %}{% endfor %}".into()),
        ("the state", "{% set x = range(99999) | list %}{% for i in range(99999) %}{{ debug() }}{% endfor %}".into()),
        ("errors that show values", "{% set x = range(99999) | list %}{{ x.foo.bar }}".into()),
        ("big numbers", rounds("3", 99_999, "{% set ns.x = ns.x * ns.x %}", "")),
        ("constants compared", format!("{{{{ {} }}}}", vec!["([1] * 99999999 == [1] * 99999998)"; 80].join(","))),
        ("constants sought", format!("{{{{ [{}] }}}}", vec!["(2 in (99999999 * [1]))"; 80].join(","))),
        ("constants repeated by parts", format!("{{{{ [{}] }}}}", vec!["(2 in (((([1]) * 9999)) * (9999)))"; 80].join(","))),
        ("constants repeated in braces", format!("{{{{ [{}] }}}}", vec!["({'a': 2}.a in 9999 * (9999 * [1]))"; 80].join(","))),
        ("powers", "{{ 9 ** 9 ** 9 ** 9 }}".into()),
        ("split texts", "{% set x = ('a,' * 100000) %}{% for i in range(99999) %}{% set y = x.split(',') %}{% endfor %}".into()),
        ("counted texts", "{% set x = 'a' * 1000000 %}{% for i in range(99999) %}{% set y = x.count('') + x.find('b') %}{% endfor %}".into()),
        ("a long source", "{{ a }}".repeat(16_000)),
        ("a long expression", format!("{{{{ {} }}}}", vec!["a"; 60_000].join("+"))),
        ("long expressions", format!("{{{{ {} }}}}", vec!["a"; 256].join("+")).repeat(250)),
        ("long conditions", format!("{{% if {} %}}{{% endif %}}", vec!["a"; 256].join(" and ")).repeat(80)),
        ("a long list", format!("{{{{ [{}] }}}}", vec!["[a]"; 30_000].join(","))),
        ("long constants", format!("{{{{ [{}] | tojson }}}}", vec!["[[]]"; 25_000].join(","))),
        ("deep expressions", format!("{{{{ {}1{} }}}}", "(".repeat(60_000), ")".repeat(60_000))),
        ("deep lists in the source", format!("{{{{ {}1{} }}}}", "[".repeat(60_000), "]".repeat(60_000))),
        ("deep lists beside each other", format!("{{{{ {} }}}}", vec![format!("{}a{}", "[".repeat(120), "]".repeat(120)); 500].join(","))),
        ("deep blocks", "{% if a %}".repeat(6_000) + &"{% endif %}".repeat(6_000)),
        ("many negations", format!("{{{{ {} a }}}}", "not ".repeat(250))),
        ("chained filters", format!("{{{{ a{} }}}}", "|d".repeat(60_000))),
        ("chained attributes", format!("{{{{ a{} }}}}", ".b".repeat(60_000))),
        ("chained conditions", format!("{{{{ {} 1 }}}}", "1 if a else ".repeat(10_000))),
    ];
    for (what, source) in source {
        let _ = bounded(what, &source);
    }
}

#[test]
fn ordinary_values_pass_the_guards() {
    let fine = [
        (
            "{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m.role] %}{% endfor %}{{ ns.l | join(',') }}",
            "user,assistant",
        ),
        ("{{ messages[1:][0].role }}{{ messages[::-1][0].role }}", "assistantassistant"),
        ("{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}", "role=user;content=hi;"),
        ("{{ messages | map(attribute='role') | list }}", "['user', 'assistant']"),
        (
            "{% macro f(a, b=2, c=3) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ f(1, c=9) }}{{ f(*[4, 5]) }}{{ f(**{'a': 7}) }}",
            "129453723",
        ),
        ("{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "123"),
        (
            "{{ 1 < 2 < 3 }}{{ 3 in [1, 3] }}{{ 'a' not in 'bcd' }}{{ (1, 2) + (3,) }}{{ [0] * 3 }}",
            "TrueTrueTrue(1, 2, 3)[0, 0, 0]",
        ),
        (
            "{% set x %}a{% endset %}{% set y = {'k': x} %}{{ y.k ~ y['k'] }}{{ dict(y, z=1) }}",
            "aa{'k': 'a', 'z': 1}",
        ),
        (
            "{% for a in [1, 2] if a > 1 %}{{ loop.first }}{{ loop.cycle('p', 'q') }}{% else %}none{% endfor %}",
            "Truep",
        ),
        (
            "{{ '{}-{:>4}'.format(1, 'b') }}{{ '%03d' | format(7) }}{{ 'xxaxx'.strip('x') }}{{ 'xxaxx' | trim('x') }}",
            "1-   b007aa",
        ),
    ];
    for (source, expected) in fine {
        assert_eq!(bounded(source, source).as_deref(), Ok(expected), "{source}");
    }
}
