"""The tools that function-calling examples are made of, in two disjoint sets.

Owns: every tool's names, parameters and the ways to ask for it.
Does not know: prompts, schemas or how an example is put together.

In a request `{0}` stands for the value of the first parameter, and so on. A parameter that some request leaves out is
optional. Each tool and parameter has several names, so that an adapter has to read the schema instead of remembering.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter; `kind` names the method of WordPool that makes its values, or is `number` or `choice`."""

    names: tuple[str, ...]
    kind: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool under several names, and requests that call for it; the last request is kept for evaluation."""

    names: tuple[str, ...]
    description: str
    parameters: tuple[Parameter, ...]
    requests: tuple[str, ...]


def _tool(names: str, description: str, parameters: str, *requests: str) -> Tool:
    """Read `name|other_name` and `city|town:city, days:number, unit:choice(a/b)` as a tool."""
    return Tool(tuple(names.split("|")), description, tuple(map(_parameter, parameters.split(", "))), requests)


def _parameter(text: str) -> Parameter:
    names, kind = text.split(":")
    choices: tuple[str, ...] = ()
    if kind.startswith("choice("):
        kind, choices = "choice", tuple(kind[len("choice(") : -1].split("/"))
    return Parameter(tuple(names.split("|")), kind, choices)


TRAIN_TOOLS = (
    _tool(
        "get_weather|weather_lookup|current_weather",
        "Get the weather of a place",
        "city|location|place:city, unit|scale:choice(celsius/fahrenheit)",
        *("What is the weather in {0}?", "How warm is it in {0} in {1}?", "Tell me the weather for {0}, in {1}."),
        "I wonder what the weather is like in {0}, in {1} please",
    ),
    _tool(
        "get_forecast|weather_forecast",
        "Get a forecast for the coming days",
        "city|location|town:city, days|num_days:number",
        *("Will it rain in {0} in the next {1} days?", "Give me the {1} day forecast for {0}", "Forecast for {0}"),
        "Do I need an umbrella in {0} during the next {1} days?",
    ),
    _tool(
        "send_email|mail_send|compose_email",
        "Send an e-mail to somebody",
        "recipient|to|addressee:person, subject|topic:title",
        *("Send an email to {0} about {1}", "Mail {0} with the subject {1}.", "Write {0} an email on {1}"),
        "{0} should get a message from me about {1}",
    ),
    _tool(
        "play_song|music_play|start_track",
        "Play a song",
        "title|song|track:title, artist|performer:person",
        *("Play {0} by {1}", "I want to hear {0}", "Please put on {0} from {1}."),
        "Could you turn on {0} by {1}?",
    ),
    _tool(
        "book_table|reserve_table|make_reservation",
        "Reserve a table in a restaurant",
        "restaurant|venue_name:title, guests|people|party_size:number",
        *("Book a table for {1} at {0}", "Reserve a table at {0} for {1} people.", "We are {1}, get us into {0}"),
        "We want to eat at {0}, {1} of us",
    ),
    _tool(
        "search_flights|find_flights|flight_search",
        "Search flights between two cities",
        "origin|from_city|departure:city, destination|to_city|arrival:city, date|day:date",
        *("Find flights from {0} to {1} on {2}", "I need to fly from {0} to {1}", "Any flight {0} to {1} on {2}?"),
        "Which planes go from {0} to {1} on {2}?",
    ),
    _tool(
        "convert_currency|exchange|currency_convert",
        "Convert an amount of money",
        "amount|value:number, source|from_currency:choice(USD/EUR/GBP/JPY), target|to_currency:choice(CHF/SEK/CAD/INR)",
        *("Convert {0} {1} to {2}", "How much is {0} {1} in {2}?", "What are {0} {1} worth in {2}?"),
        "Change {0} {1} into {2}",
    ),
    _tool(
        "set_timer|start_timer",
        "Start a countdown",
        "minutes|duration|length:number",
        *("Set a timer for {0} minutes", "Wake me in {0} minutes.", "Start a {0} minute countdown"),
        "Let me know when {0} minutes are over",
    ),
    _tool(
        "create_event|add_event|schedule_meeting",
        "Put an event into the calendar",
        "title|name|event:title, date|day|when:date",
        *("Put {0} in my calendar on {1}", "Schedule {0} for {1}.", "Add the event {0} on {1}"),
        "Remember that {0} is on {1}",
    ),
    _tool(
        "translate|translate_text",
        "Translate a text",
        "text|phrase:title, language|target_language:choice(French/German/Spanish/Italian/Polish)",
        *("Translate {0} into {1}", "How do you say {0} in {1}?", "What is {0} in {1}?"),
        "I need the {1} words for {0}",
    ),
    _tool(
        "get_stock|stock_quote|share_price",
        "Get the price of a share",
        "symbol|ticker:code",
        *("What is {0} trading at?", "Get me the price of {0} stock", "Quote for {0}, please"),
        "How much does a share of {0} cost?",
    ),
    _tool(
        "track_parcel|parcel_status|where_is_parcel",
        "Find out where a parcel is",
        "tracking_number|parcel_id|number:code",
        *("Where is my parcel {0}?", "Track {0}", "Has the package {0} arrived?"),
        "I am waiting for parcel {0}, where is it?",
    ),
    _tool(
        "find_person|lookup_employee|search_people",
        "Find a person in the directory",
        "name|full_name:person, office|site:city",
        *("Find {0} in the {1} office", "Look up {0}", "Who is {0} from {1}?"),
        "I have to talk to {0} who works in {1}",
    ),
    _tool(
        "order_food|place_order",
        "Order a dish",
        "dish|meal|item:title, quantity|count|portions:number",
        *("Order {1} portions of {0}", "I would like {1} of {0}, please", "Get me {0}"),
        "Could I have {1} times {0}?",
    ),
    _tool(
        "add_note|save_note|write_note",
        "Save a note in a folder",
        "text|content|body:title, folder|category:choice(work/home/travel/ideas)",
        *("Note down {0} under {1}", "Save a note: {0}", "Write {0} into my {1} notes"),
        "Keep {0} in the {1} notes for me",
    ),
    _tool(
        "get_distance|route_length",
        "Measure the way between two places",
        "start|from:city, end|to:city, mode|by:choice(car/train/bike)",
        *(
            "How far is it from {0} to {1} by {2}?",
            "Distance from {0} to {1}",
            "How long is the {2} trip from {0} to {1}?",
        ),
        "How many kilometers are there between {0} and {1} by {2}?",
    ),
    _tool(
        "set_temperature|adjust_heating|thermostat",
        "Set the temperature of a room",
        "room|zone:choice(kitchen/bedroom/bathroom/hall), degrees|temperature|level:number",
        *("Set the {0} to {1} degrees", "Make the {0} {1} degrees warm", "I want {1} degrees in the {0}"),
        "It should be {1} degrees in the {0}",
    ),
    _tool(
        "get_book|book_info|find_book",
        "Find a book",
        "title|book:title, author|writer:person",
        *("Find the book {0} by {1}", "Do you have {0}?", "I am looking for {0}, written by {1}."),
        "Which library has {0} by {1}?",
    ),
    _tool(
        "transfer_money|send_payment|pay_person",
        "Pay somebody",
        "payee|receiver|to:person, amount|sum:number",
        *("Send {1} dollars to {0}", "Pay {0} {1} euros", "Transfer {1} to {0}, please."),
        "I owe {0} {1} dollars, settle it",
    ),
    _tool(
        "open_ticket|report_bug|create_issue",
        "Report a problem",
        "summary|title|problem:title, priority|severity:choice(low/medium/high)",
        *("Report a {1} priority problem: {0}", "Open a ticket for {0}", "There is a bug, {0}, it is {1}"),
        "Something is wrong: {0}. This is of {1} priority",
    ),
    _tool(
        "rent_car|car_rental|hire_car",
        "Rent a car",
        "city|pickup|location:city, days|duration:number, category|size:choice(small/large/electric)",
        *(
            "Rent a {2} car in {0} for {1} days",
            "I need a car in {0} for {1} days.",
            "Get me a {2} car in {0}, {1} days",
        ),
        "For {1} days in {0} I want to drive a {2} car",
    ),
    _tool(
        "get_order|order_status",
        "Look at an order",
        "order_id|id|reference:code, customer|buyer:person",
        *("What about order {0} of {1}?", "Show order {0}", "Check {0} for {1}"),
        "{1} wants to know about order {0}",
    ),
    _tool(
        "get_recipe|recipe_search|how_to_cook",
        "Find a recipe",
        "dish|meal|food:title, servings|portions|people:number",
        *("How do I cook {0} for {1}?", "Recipe for {0}", "Show me how {0} is made, for {1} people."),
        "I want to make {0}, there are {1} of us",
    ),
    _tool(
        "remind_me|set_reminder|add_reminder",
        "Remind the user of something",
        "text|task|what:title, date|when|day:date",
        *("Remind me of {0} on {1}", "On {1}, remind me about {0}", "I must not forget {0} on {1}."),
        "Tell me about {0} again on {1}",
    ),
    _tool(
        "switch_light|toggle_lamp|set_light",
        "Switch a light",
        "room|lamp|place:choice(kitchen/garage/balcony/office), state|mode:choice(on/off/dim)",
        *("Switch the {0} light {1}", "Turn {1} the lamp in the {0}", "I want the {0} {1}", "The {0} light goes {1}"),
        "Make the light in the {0} {1}",
    ),
    _tool(
        "find_restaurant|restaurant_search|places_to_eat",
        "Find restaurants in a city",
        "city|location|near:city, cuisine|kitchen_style|food_type:choice(Thai/Greek/Indian/Mexican)",
        *("Where can I eat {1} food in {0}?", "{1} restaurants in {0}", "Find a place to eat in {0}", "{0}, {1} food"),
        "I am in {0} and would like to eat {1} food",
    ),
    _tool(
        "invite|invite_user|add_member",
        "Invite somebody to a project",
        "user|name|invitee:person, project|group|team:title",
        *("Invite {0} to {1}", "Add {0} to the project {1}", "{0} should join {1}.", "Let {0} into the {1} team"),
        "We want {0} as a member of {1}",
    ),
    _tool(
        "delete_file|remove_file|erase",
        "Delete a file",
        "file|filename|path:code, reason|why:title",
        *("Delete {0}", "Remove the file {0} because of {1}", "Get rid of {0}, reason {1}", "Erase {0} please"),
        "I no longer need {0}, because of {1}",
    ),
    _tool(
        "get_population|count_inhabitants|city_size",
        "Say how many people live in a city",
        "city|town|place:city, year|in_year:number",
        *("How many people live in {0}?", "Population of {0} in {1}", "How big was {0} in {1}?", "Count {0} in {1}"),
        "What number of people did {0} have in {1}?",
    ),
    _tool(
        "assign_task|give_task|delegate",
        "Give a task to a person",
        "task|title|job:title, assignee|worker|person:person, hours|effort|estimate:number",
        *("{1} should do {0} in {2} hours", "Assign {0} to {1}", "Give {0} to {1}, {2} hours", "Let {1} do {0}"),
        "I want {1} to work {2} hours on {0}",
    ),
    _tool(
        "compare_cities|city_comparison",
        "Compare two cities",
        "first|city_a|left_city:city, second|city_b|right_city:city, topic|aspect:choice(rent/climate/safety)",
        *("Compare {0} and {1}", "Compare the {2} of {0} and {1}", "Is {0} or {1} better for {2}?", "{0} or {1}?"),
        "How does {0} differ from {1} in {2}?",
    ),
    _tool(
        "log_workout|record_training|add_exercise",
        "Record a workout",
        "sport|activity|kind:choice(running/swimming/cycling/yoga), minutes|duration|time:number",
        *("I did {0} for {1} minutes", "Log {1} minutes of {0}", "{0}, {1} minutes", "Add {1} minutes {0}"),
        "Today it was {1} minutes of {0}",
    ),
)

HELD_OUT_TOOLS = (
    _tool(
        "find_hotel|hotel_search",
        "Look for hotels in a town",
        "destination_town|where:city, nights|stay_length:number, stars|rating:choice(three/four/five)",
        *("I am staying {1} nights in {0}, which hotels are there?", "Look for {2} star hotels in {0} for {1} nights"),
    ),
    _tool(
        "rename_file|change_filename",
        "Give a file another name",
        "old_name|current_file:code, new_name|wanted_file:code",
        *("Rename {0} as {1}", "The file {0} should be called {1}"),
    ),
    _tool(
        "call_contact|dial|phone_contact",
        "Phone somebody",
        "contact|callee:person, line|device:choice(mobile/landline)",
        *("Call {0} on the {1}", "Ring up {0} for me"),
    ),
    _tool(
        "buy_ticket|purchase_admission",
        "Buy tickets for a show",
        "show|performance:title, seats|admissions:number",
        *("I would like {1} tickets for {0}", "Buy {1} seats to see {0}"),
    ),
    _tool(
        "repair_request|request_technician",
        "Ask for a technician to come",
        "appliance|machine:choice(dishwasher/oven/boiler), visit_date|appointment:date",
        *("My {0} is broken, can somebody come on {1}?", "Ask a technician to see the {0} on {1}"),
    ),
    _tool(
        "set_volume|change_loudness",
        "Change how loud a speaker is",
        "speaker|output:choice(left/right/front), percent|loudness:number",
        *("Turn the {0} speaker to {1} percent", "I would like the {0} one at {1} percent loudness"),
    ),
    _tool(
        "list_trains|train_departures",
        "List departing trains",
        "station|stop:city, carrier|operator:choice(regional/express/night)",
        *("Which {1} trains leave {0}?", "Departures at {0}, please"),
    ),
    _tool(
        "loan_book|borrow|check_out",
        "Lend a library item to a member",
        "member|borrower:person, item_code|shelf_mark:code, weeks|period:number",
        *("Lend {1} to {0} for {2} weeks", "{0} takes home {1} for {2} weeks"),
    ),
    _tool(
        "share_photo|publish_picture",
        "Share a photo with somebody",
        "album|collection:title, viewer|friend:person",
        *("Let {1} see my photos of {0}", "Share {0} with {1}"),
    ),
    _tool(
        "water_plants|irrigate",
        "Water a part of the garden",
        "area|bed:choice(roses/lawn/tomatoes), liters|volume:number",
        *("Give the {0} {1} liters of water", "Water the {0}, {1} liters"),
    ),
)
