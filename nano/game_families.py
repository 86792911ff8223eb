"""The game families as templates; games.py turns one into a page.

`$name` is spelled by the page's naming style, `<<a|b>>` picks one text, `COLOR` a colour.
`@rect x; y; w; h; colour` and `@disc x; y; r; colour` draw. A line that starts with `//` is
a comment and may be left out. Indentation follows the braces, quotes the style.
"""

# Template lines are lines of the page, long conditions included.
# ruff: noqa: E501

TRAINED = {
    "Flappy Bird": """
names: bird=bird/player/b pipes=pipes/walls/obs
hint: Press Space or click to flap.
== constants
const GRAVITY = <<0.25|0.35|0.4|0.5>>;
const FLAP = -<<6|7|8>>;
const GAP = <<120|130|140|150>>;
const PIPE_WIDTH = <<50|52|60>>;
const SPEED = <<2|3>>;
== state
$let $bird = { x: <<60|80|100>>, y: $H / 2, vy: 0, r: <<10|12|14>> };
$let $pipes = [];
$let frames = 0;
== reset
$bird.y = $H / 2;
$bird.vy = 0;
$pipes = [];
frames = 0;
== helpers
fn flap()
if ($over) {
$reset();
return;
}
$bird.vy = FLAP;
end
fn addPipe()
const top = <<40|50|60>> + Math.random() * ($H - GAP - <<100|120>>);
$pipes.push({ x: $W, top: top, passed: false });
end
== update
// <<Move the bird|Apply gravity>>
$bird.vy += GRAVITY;
$bird.y += $bird.vy;
frames++;
if (frames % <<80|90|100|110>> === 0) addPipe();
for (const p of $pipes) {
p.x -= SPEED;
if (!p.passed && p.x + PIPE_WIDTH < $bird.x) {
p.passed = true;
$score++;
}
// <<Check the collision|Did the bird hit a pipe?>>
if ($bird.x + $bird.r > p.x && $bird.x - $bird.r < p.x + PIPE_WIDTH) {
if ($bird.y - $bird.r < p.top || $bird.y + $bird.r > p.top + GAP) $end();
}
}
$pipes = $pipes.filter(p => p.x > -PIPE_WIDTH);
if ($bird.y + $bird.r > $H || $bird.y < 0) $end();
== draw
// <<Pipes|Draw the pipes>>
$ctx.fillStyle = COLOR;
for (const p of $pipes) {
$ctx.fillRect(p.x, 0, PIPE_WIDTH, p.top);
$ctx.fillRect(p.x, p.top + GAP, PIPE_WIDTH, $H - p.top - GAP);
}
// <<Bird|Draw the bird>>
@disc $bird.x; $bird.y; $bird.r; COLOR
== controls
document.addEventListener('keydown', e => {
if (e.code === 'Space') flap();
});
$canvas.addEventListener('<<click|mousedown>>', flap);
""",
    "Snake": """
names: snake=snake/body/s food=food/apple/fruit
hint: Use the arrow keys to steer.
== constants
const CELL = <<16|20|25>>;
const COLS = Math.floor($W / CELL);
const ROWS = Math.floor($H / CELL);
const DELAY = <<6|7|8|10>>;
== state
$let $snake = [{ x: <<4|5|6>>, y: <<4|5|6>> }];
$let $food = { x: <<8|10|12>>, y: <<7|8|9>> };
$let dir = { x: 1, y: 0 };
$let frames = 0;
== reset
$snake = [{ x: 5, y: 5 }];
dir = { x: 1, y: 0 };
frames = 0;
placeFood();
== helpers
fn placeFood()
$food.x = Math.floor(Math.random() * COLS);
$food.y = Math.floor(Math.random() * ROWS);
end
fn turn(x, y)
if (dir.x === -x && dir.y === -y) return;
dir = { x: x, y: y };
end
== update
frames++;
if (frames % DELAY !== 0) return;
const head = { x: $snake[0].x + dir.x, y: $snake[0].y + dir.y };
// <<Walls and tail end the game|Did the snake hit something?>>
if (head.x < 0 || head.y < 0 || head.x >= COLS || head.y >= ROWS) {
$end();
return;
}
if ($snake.some(p => p.x === head.x && p.y === head.y)) {
$end();
return;
}
$snake.unshift(head);
// <<Eat the food|Grow when eating>>
if (head.x === $food.x && head.y === $food.y) {
$score += <<1|5|10>>;
placeFood();
} else {
$snake.pop();
}
== draw
// <<Food|Draw the food>>
@rect $food.x * CELL; $food.y * CELL; CELL; CELL; COLOR
// <<Snake|Draw the snake>>
$ctx.fillStyle = COLOR;
for (const p of $snake) {
$ctx.fillRect(p.x * CELL, p.y * CELL, CELL - 1, CELL - 1);
}
== controls
document.addEventListener('keydown', e => {
if (e.code === 'ArrowLeft') turn(-1, 0);
if (e.code === 'ArrowRight') turn(1, 0);
if (e.code === 'ArrowUp') turn(0, -1);
if (e.code === 'ArrowDown') turn(0, 1);
if ($over && e.code === 'Space') $reset();
});
""",
    "Pong": """
names: left=left/player/p1 right=right/enemy/p2 ball=ball/puck/ball
hint: Move your paddle with the arrow keys.
keys: yes
== constants
const PADDLE_W = <<8|10|12>>;
const PADDLE_H = <<60|70|80|90>>;
const SPEED = <<4|5|6>>;
== state
$let $left = { x: 10, y: $H / 2 - PADDLE_H / 2 };
$let $right = { x: $W - 10 - PADDLE_W, y: $H / 2 - PADDLE_H / 2 };
$let $ball = { x: $W / 2, y: $H / 2, vx: <<3|4>>, vy: <<2|3>>, r: <<6|7|8>> };
== reset
$left.y = $H / 2 - PADDLE_H / 2;
$right.y = $left.y;
serve();
== helpers
fn serve()
$ball.x = $W / 2;
$ball.y = $H / 2;
$ball.vx = <<3|4>>;
$ball.vy = Math.random() < 0.5 ? 2 : -2;
end
fn hits(p)
return $ball.x + $ball.r > p.x && $ball.x - $ball.r < p.x + PADDLE_W && $ball.y > p.y && $ball.y < p.y + PADDLE_H;
end
== update
// <<Move the player|Player paddle>>
if ($keys['ArrowUp']) $left.y -= SPEED;
if ($keys['ArrowDown']) $left.y += SPEED;
$left.y = Math.max(0, Math.min($H - PADDLE_H, $left.y));
// <<Simple AI|The computer follows the ball>>
$right.y += ($ball.y - $right.y - PADDLE_H / 2) * <<0.06|0.08|0.1>>;
// <<Move the ball|Ball movement>>
$ball.x += $ball.vx;
$ball.y += $ball.vy;
if ($ball.y < $ball.r || $ball.y > $H - $ball.r) $ball.vy = -$ball.vy;
if (hits($left)) $ball.vx = Math.abs($ball.vx) * <<1.02|1.05>>;
if (hits($right)) $ball.vx = -Math.abs($ball.vx);
if ($ball.x > $W) {
$score++;
serve();
}
if ($ball.x < 0) $end();
== draw
// <<Paddles|Draw the paddles>>
@rect $left.x; $left.y; PADDLE_W; PADDLE_H; COLOR
@rect $right.x; $right.y; PADDLE_W; PADDLE_H; COLOR
// <<Ball|Draw the ball>>
@disc $ball.x; $ball.y; $ball.r; COLOR
""",
    "Breakout": """
names: paddle=paddle/bat/pad ball=ball/ball/ball bricks=bricks/blocks/bricks
hint: Move the paddle with the arrow keys.
keys: yes
== constants
const ROWS = <<3|4|5>>;
const COLS = <<6|7|8>>;
const BRICK_W = $W / COLS;
const BRICK_H = <<16|18|20>>;
const SPEED = <<5|6|7>>;
== state
$let $paddle = { x: $W / 2 - 40, y: $H - <<20|24|30>>, w: <<70|80|90>>, h: <<8|10|12>> };
$let $ball = { x: $W / 2, y: $H - 60, vx: <<2|3>>, vy: -<<3|4>>, r: <<6|7|8>> };
$let $bricks = [];
== reset
$paddle.x = $W / 2 - 40;
$ball.x = $W / 2;
$ball.y = $H - 60;
$ball.vy = -<<3|4>>;
buildBricks();
== helpers
fn buildBricks()
$bricks = [];
for ($let r = 0; r < ROWS; r++) {
for ($let i = 0; i < COLS; i++) {
$bricks.push({ x: i * BRICK_W, y: <<30|40>> + r * BRICK_H });
}
}
end
== update
// <<Move the paddle|Paddle movement>>
if ($keys['ArrowLeft']) $paddle.x -= SPEED;
if ($keys['ArrowRight']) $paddle.x += SPEED;
$paddle.x = Math.max(0, Math.min($W - $paddle.w, $paddle.x));
// <<Move the ball|Ball movement>>
$ball.x += $ball.vx;
$ball.y += $ball.vy;
if ($ball.x < $ball.r || $ball.x > $W - $ball.r) $ball.vx = -$ball.vx;
if ($ball.y < $ball.r) $ball.vy = -$ball.vy;
if ($ball.y + $ball.r > $paddle.y && $ball.x > $paddle.x && $ball.x < $paddle.x + $paddle.w) {
$ball.vy = -Math.abs($ball.vy);
}
// <<Break the bricks|Hit a brick>>
for ($let i = $bricks.length - 1; i >= 0; i--) {
const o = $bricks[i];
if ($ball.x > o.x && $ball.x < o.x + BRICK_W && $ball.y > o.y && $ball.y < o.y + BRICK_H) {
$bricks.splice(i, 1);
$ball.vy = -$ball.vy;
$score += <<1|5|10>>;
}
}
if ($bricks.length === 0) buildBricks();
if ($ball.y > $H) $end();
== draw
// <<Bricks|Draw the bricks>>
$ctx.fillStyle = COLOR;
for (const o of $bricks) {
$ctx.fillRect(o.x + 1, o.y + 1, BRICK_W - 2, BRICK_H - 2);
}
// <<Paddle|Draw the paddle>>
@rect $paddle.x; $paddle.y; $paddle.w; $paddle.h; COLOR
// <<Ball|Draw the ball>>
@disc $ball.x; $ball.y; $ball.r; COLOR
== start
buildBricks();
""",
    "Catch the Fruit": """
names: basket=basket/bucket/pad items=items/fruits/drops
hint: Catch the falling fruit with the arrow keys.
keys: yes
== constants
const SPEED = <<5|6|7>>;
const FALL = <<2|3|4>>;
== state
$let $basket = { x: $W / 2 - 30, y: $H - <<30|40>>, w: <<50|60|70>>, h: <<12|16|20>> };
$let $items = [];
$let lives = <<3|4|5>>;
$let frames = 0;
== reset
$basket.x = $W / 2 - 30;
$items = [];
lives = <<3|4|5>>;
frames = 0;
== helpers
fn addItem()
$items.push({ x: 20 + Math.random() * ($W - 40), y: -10, r: <<7|8|10>> });
end
== update
// <<Move the basket|Basket movement>>
if ($keys['ArrowLeft']) $basket.x -= SPEED;
if ($keys['ArrowRight']) $basket.x += SPEED;
$basket.x = Math.max(0, Math.min($W - $basket.w, $basket.x));
frames++;
if (frames % <<40|50|60>> === 0) addItem();
for ($let i = $items.length - 1; i >= 0; i--) {
const o = $items[i];
o.y += FALL;
// <<Caught|Did we catch it?>>
if (o.y + o.r > $basket.y && o.x > $basket.x && o.x < $basket.x + $basket.w) {
$items.splice(i, 1);
$score += <<1|5|10>>;
} else if (o.y > $H) {
$items.splice(i, 1);
lives--;
if (lives <= 0) $end();
}
}
== draw
// <<Items|Draw the fruit>>
for (const o of $items) {
@disc o.x; o.y; o.r; COLOR
}
// <<Basket|Draw the basket>>
@rect $basket.x; $basket.y; $basket.w; $basket.h; COLOR
$ctx.fillStyle = COLOR;
$ctx.fillText('Lives: ' + lives, $W - <<90|100>>, 24);
""",
    "Space Shooter": """
names: ship=ship/player/p shots=shots/bullets/shots foes=enemies/aliens/foes
hint: Move with the arrow keys, fire with Space.
keys: yes
== constants
const SPEED = <<4|5|6>>;
const SHOT_SPEED = <<6|7|8>>;
const FALL = <<1|1.5|2>>;
== state
$let $ship = { x: $W / 2, y: $H - <<30|40>>, r: <<12|14|16>> };
$let $shots = [];
$let $foes = [];
$let frames = 0;
== reset
$ship.x = $W / 2;
$shots = [];
$foes = [];
frames = 0;
== helpers
fn addFoe()
$foes.push({ x: 20 + Math.random() * ($W - 40), y: -20, r: <<12|14|16>> });
end
fn fire()
$shots.push({ x: $ship.x, y: $ship.y - $ship.r, r: <<3|4>> });
end
fn touch(a, b)
return Math.hypot(a.x - b.x, a.y - b.y) < a.r + b.r;
end
== update
// <<Move the ship|Ship movement>>
if ($keys['ArrowLeft']) $ship.x -= SPEED;
if ($keys['ArrowRight']) $ship.x += SPEED;
$ship.x = Math.max($ship.r, Math.min($W - $ship.r, $ship.x));
frames++;
if (frames % <<40|50|60>> === 0) addFoe();
for (const o of $shots) o.y -= SHOT_SPEED;
$shots = $shots.filter(o => o.y > 0);
for ($let i = $foes.length - 1; i >= 0; i--) {
const f = $foes[i];
f.y += FALL;
// <<Shot down|Was it hit?>>
const hit = $shots.find(o => touch(o, f));
if (hit) {
$shots = $shots.filter(o => o !== hit);
$foes.splice(i, 1);
$score += <<1|5|10>>;
} else if (f.y > $H || touch($ship, f)) {
$end();
}
}
== draw
// <<Ship|Draw the ship>>
@disc $ship.x; $ship.y; $ship.r; COLOR
// <<Shots|Draw the shots>>
for (const o of $shots) {
@disc o.x; o.y; o.r; COLOR
}
// <<Enemies|Draw the enemies>>
for (const f of $foes) {
@rect f.x - f.r; f.y - f.r; f.r * 2; f.r * 2; COLOR
}
== press
if (e.code === 'Space' && !$over) fire();
""",
    "Dodge the Blocks": """
names: player=player/hero/p blocks=blocks/rocks/obs
hint: Avoid the falling blocks with the arrow keys.
keys: yes
== constants
const SPEED = <<4|5|6>>;
const SIZE = <<20|24|30>>;
== state
$let $player = { x: $W / 2, y: $H - <<40|50>>, w: <<20|24>>, h: <<20|24>> };
$let $blocks = [];
$let fall = <<2|3>>;
$let frames = 0;
== reset
$player.x = $W / 2;
$blocks = [];
fall = <<2|3>>;
frames = 0;
== helpers
fn addBlock()
$blocks.push({ x: Math.random() * ($W - SIZE), y: -SIZE });
end
fn hits(o)
return o.x < $player.x + $player.w && o.x + SIZE > $player.x && o.y < $player.y + $player.h && o.y + SIZE > $player.y;
end
== update
// <<Move the player|Player movement>>
if ($keys['ArrowLeft']) $player.x -= SPEED;
if ($keys['ArrowRight']) $player.x += SPEED;
$player.x = Math.max(0, Math.min($W - $player.w, $player.x));
frames++;
if (frames % <<20|25|30>> === 0) addBlock();
// <<It gets faster|Speed up>>
fall += 0.<<001|002>>;
for (const o of $blocks) {
o.y += fall;
if (hits(o)) $end();
}
$score += $blocks.filter(o => o.y > $H).length;
$blocks = $blocks.filter(o => o.y <= $H);
== draw
// <<Player|Draw the player>>
@rect $player.x; $player.y; $player.w; $player.h; COLOR
// <<Blocks|Draw the blocks>>
$ctx.fillStyle = COLOR;
for (const o of $blocks) {
$ctx.fillRect(o.x, o.y, SIZE, SIZE);
}
""",
    "Endless Runner": """
names: runner=runner/dino/p cacti=obstacles/cacti/obs
hint: Press Space or click to jump.
== constants
const GRAVITY = <<0.5|0.6|0.7>>;
const JUMP = -<<10|11|12>>;
const GROUND = $H - <<40|50|60>>;
== state
$let $runner = { x: <<50|60|80>>, y: GROUND - 30, w: 24, h: 30, vy: 0 };
$let $cacti = [];
$let speed = <<4|5>>;
$let frames = 0;
== reset
$runner.y = GROUND - 30;
$runner.vy = 0;
$cacti = [];
speed = <<4|5>>;
frames = 0;
== helpers
fn jump()
if ($over) {
$reset();
return;
}
if ($runner.y + $runner.h >= GROUND) $runner.vy = JUMP;
end
fn addCactus()
$cacti.push({ x: $W, h: <<20|25>> + Math.random() * <<20|25|30>>, w: <<14|16|20>> });
end
== update
// <<Apply gravity|Move the runner>>
$runner.vy += GRAVITY;
$runner.y += $runner.vy;
if ($runner.y + $runner.h > GROUND) {
$runner.y = GROUND - $runner.h;
$runner.vy = 0;
}
frames++;
if (frames % <<80|90|100>> === 0) addCactus();
if (frames % 10 === 0) $score++;
speed += 0.<<001|002>>;
for (const o of $cacti) {
o.x -= speed;
// <<Check the collision|Did the runner hit it?>>
if ($runner.x + $runner.w > o.x && $runner.x < o.x + o.w && $runner.y + $runner.h > GROUND - o.h) {
$end();
}
}
$cacti = $cacti.filter(o => o.x > -o.w);
== draw
// <<Ground|Draw the ground>>
@rect 0; GROUND; $W; $H - GROUND; COLOR
// <<Runner|Draw the runner>>
@rect $runner.x; $runner.y; $runner.w; $runner.h; COLOR
// <<Obstacles|Draw the obstacles>>
$ctx.fillStyle = COLOR;
for (const o of $cacti) {
$ctx.fillRect(o.x, GROUND - o.h, o.w, o.h);
}
== controls
document.addEventListener('keydown', e => {
if (e.code === 'Space') jump();
});
$canvas.addEventListener('<<click|mousedown>>', jump);
""",
    "Whack the Mole": """
names: moles=moles/targets/moles
hint: Click the moles before they hide.
== constants
const COLS = <<3|4>>;
const ROWS = <<3|4>>;
const CELL_W = $W / COLS;
const CELL_H = $H / ROWS;
const STAY = <<50|60|70|80>>;
== state
$let $moles = [];
$let missed = 0;
$let frames = 0;
== reset
$moles = [];
missed = 0;
frames = 0;
== helpers
fn addMole()
const col = Math.floor(Math.random() * COLS);
const row = Math.floor(Math.random() * ROWS);
$moles.push({ x: (col + 0.5) * CELL_W, y: (row + 0.5) * CELL_H, r: <<20|24|28>>, age: 0 });
end
== update
frames++;
if (frames % <<40|50|60>> === 0) addMole();
for ($let i = $moles.length - 1; i >= 0; i--) {
const o = $moles[i];
o.age++;
// <<Missed|Too late>>
if (o.age > STAY) {
$moles.splice(i, 1);
missed++;
if (missed >= <<5|8|10>>) $end();
}
}
== draw
// <<Holes|Draw the grid>>
$ctx.strokeStyle = COLOR;
for ($let r = 0; r < ROWS; r++) {
for ($let i = 0; i < COLS; i++) {
$ctx.strokeRect(i * CELL_W, r * CELL_H, CELL_W, CELL_H);
}
}
// <<Moles|Draw the moles>>
for (const o of $moles) {
@disc o.x; o.y; o.r; COLOR
}
$ctx.fillStyle = COLOR;
$ctx.fillText('Missed: ' + missed, $W - <<100|110>>, 24);
== controls
$canvas.addEventListener('<<click|mousedown>>', e => {
if ($over) {
$reset();
return;
}
const rect = $canvas.getBoundingClientRect();
const x = e.clientX - rect.left;
const y = e.clientY - rect.top;
const hit = $moles.find(o => Math.hypot(o.x - x, o.y - y) < o.r);
if (hit) {
$moles = $moles.filter(o => o !== hit);
$score++;
}
});
""",
}

HELD_BACK = {
    "Road Crossing": """
names: frog=frog/player/p cars=cars/trucks/cars
hint: Cross the road with the arrow keys.
== constants
const LANES = <<4|5|6>>;
const STEP = $H / (LANES + 2);
const CAR_W = <<40|50|60>>;
== state
$let $frog = { x: $W / 2, y: $H - STEP / 2, r: <<10|12>> };
$let $cars = [];
== reset
$frog.x = $W / 2;
$frog.y = $H - STEP / 2;
buildCars();
== helpers
fn buildCars()
$cars = [];
for ($let i = 1; i <= LANES; i++) {
$cars.push({ x: Math.random() * $W, y: i * STEP, v: <<1|2>> + Math.random() * <<2|3>> });
}
end
fn move(x, y)
$frog.x = Math.max($frog.r, Math.min($W - $frog.r, $frog.x + x));
$frog.y = Math.min($H - STEP / 2, $frog.y + y);
end
== update
for (const o of $cars) {
o.x += o.v;
if (o.x > $W) o.x = -CAR_W;
// <<Run over|Did a car hit the frog?>>
if ($frog.x + $frog.r > o.x && $frog.x - $frog.r < o.x + CAR_W && $frog.y > o.y && $frog.y < o.y + STEP) {
$end();
}
}
// <<Reached the other side|Across the road>>
if ($frog.y < STEP) {
$score++;
$frog.y = $H - STEP / 2;
}
== draw
// <<Cars|Draw the cars>>
$ctx.fillStyle = COLOR;
for (const o of $cars) {
$ctx.fillRect(o.x, o.y + 6, CAR_W, STEP - 12);
}
// <<Frog|Draw the frog>>
@disc $frog.x; $frog.y; $frog.r; COLOR
== controls
document.addEventListener('keydown', e => {
if ($over && e.code === 'Space') $reset();
if (e.code === 'ArrowLeft') move(-STEP, 0);
if (e.code === 'ArrowRight') move(STEP, 0);
if (e.code === 'ArrowUp') move(0, -STEP);
if (e.code === 'ArrowDown') move(0, STEP);
});
== start
buildCars();
""",
    "Coin Collector": """
names: hero=hero/player/p coins=coins/stars/coins ghost=ghost/enemy/foe
hint: Collect the coins and keep away from the ghost.
keys: yes
== constants
const SPEED = <<3|4>>;
const COINS = <<5|6|8>>;
== state
$let $hero = { x: $W / 2, y: $H / 2, r: <<10|12>> };
$let $ghost = { x: 20, y: 20, r: <<10|12>>, v: <<1|1.5>> };
$let $coins = [];
== reset
$hero.x = $W / 2;
$hero.y = $H / 2;
$ghost.x = 20;
$ghost.y = 20;
$coins = [];
== helpers
fn addCoin()
$coins.push({ x: 20 + Math.random() * ($W - 40), y: 20 + Math.random() * ($H - 40), r: <<5|6|7>> });
end
fn near(a, b)
return Math.hypot(a.x - b.x, a.y - b.y) < a.r + b.r;
end
== update
// <<Move the hero|Hero movement>>
if ($keys['ArrowLeft']) $hero.x -= SPEED;
if ($keys['ArrowRight']) $hero.x += SPEED;
if ($keys['ArrowUp']) $hero.y -= SPEED;
if ($keys['ArrowDown']) $hero.y += SPEED;
$hero.x = Math.max($hero.r, Math.min($W - $hero.r, $hero.x));
$hero.y = Math.max($hero.r, Math.min($H - $hero.r, $hero.y));
// <<The ghost follows|Chase the hero>>
$ghost.x += $ghost.x < $hero.x ? $ghost.v : -$ghost.v;
$ghost.y += $ghost.y < $hero.y ? $ghost.v : -$ghost.v;
if (near($ghost, $hero)) $end();
while ($coins.length < COINS) addCoin();
for ($let i = $coins.length - 1; i >= 0; i--) {
if (near($coins[i], $hero)) {
$coins.splice(i, 1);
$score += <<1|5|10>>;
}
}
== draw
// <<Coins|Draw the coins>>
for (const o of $coins) {
@disc o.x; o.y; o.r; COLOR
}
// <<Hero|Draw the hero>>
@disc $hero.x; $hero.y; $hero.r; COLOR
// <<Ghost|Draw the ghost>>
@disc $ghost.x; $ghost.y; $ghost.r; COLOR
""",
}
