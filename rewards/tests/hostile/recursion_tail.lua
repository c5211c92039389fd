-- may end in: timeout instructions runtime memory
function reward(sample, ctx)
  if sample.completion == "bad" then
    do local function f() return f() end return f() end
  end
  if secret ~= nil or ctx.options.x ~= nil or sample.extra ~= nil then return -1 end
  return #sample.completion
end
